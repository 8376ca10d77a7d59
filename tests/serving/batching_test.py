"""Batches: which requests are put together, which are not, and what each one gets."""

import math
import threading
import time
from concurrent import futures

import grpc
import numpy as np
import pytest

from serving.tf_serving.batching import Batcher, Parameters, run_alone
from serving.tf_serving.status import StatusError, invalid


class Doubler:
  """A stand-in for a Signature that doubles x, records its batches, and can be blocked."""

  def __init__(self, *, total: bool = False):
    self.batchable = True
    self.batches = []
    self.gate = threading.Event()
    self.gate.set()
    self._total = total

  def run(self, inputs):
    self.batches.append(inputs["x"].tolist())
    assert self.gate.wait(30)
    if np.any(inputs["x"] < 0):
      raise invalid("x must not be negative")
    return {"y": 2 * inputs["x"], **({"total": inputs["x"].sum()} if self._total else {})}


def send(threads, batcher, signature, x, deadline=math.inf) -> futures.Future:
  """Sends a request and waits until it is queued or answered, so that requests arrive in order."""
  seen = batcher._num_rows, len(signature.batches)
  future = threads.submit(batcher.run, signature, {"x": np.array(x)}, deadline)
  while (batcher._num_rows, len(signature.batches)) == seen and not future.done():
    time.sleep(0.001)
  return future


def hold_up(threads, batcher, signature) -> futures.Future:
  """Sends [0], which runs, with all others behind it, until the signature's gate is opened."""
  signature.gate.clear()
  future = threads.submit(batcher.run, signature, {"x": np.array([0])}, math.inf)
  while not signature.batches:
    time.sleep(0.001)
  return future


def ask_all(batcher, signature, xs, *, held_up: bool = False) -> list:
  """Sends each x as a separate request, in order; returns the doubled x or status code of each."""

  def answer(future):
    try:
      return future.result(30)["y"].tolist()
    except StatusError as error:
      return error.code

  with futures.ThreadPoolExecutor(len(xs) + 1) as threads:
    waiting = [hold_up(threads, batcher, signature)] if held_up else []
    waiting += [send(threads, batcher, signature, x) for x in xs]
    signature.gate.set()
    return [answer(future) for future in waiting]


def behind_one(parameters: Parameters, xs, *, signature=None):
  """Sends [0] and, while it runs, all xs.

  Returns their answers and the batches of x that ran.
  """
  signature = signature or Doubler()
  signature.batches.clear()
  answers = ask_all(Batcher(parameters), signature, xs, held_up=True)
  assert (answers[0], signature.batches[0]) == ([0], [0])
  return answers[1:], signature.batches[1:]


def test_requests_that_wait_are_run_together():
  answers, batches = behind_one(Parameters(num_threads=1), [[1], [2, 3], [4]])
  assert answers == [[2], [4, 6], [8]]
  assert batches == [[1, 2, 3, 4]]


def test_a_batch_has_at_most_max_batch_size_rows():
  answers, batches = behind_one(
    Parameters(num_threads=1, max_batch_size=3), [[1], [2], [3, 4], [5]]
  )
  assert answers == [[2], [4], [6, 8], [10]]
  assert batches == [[1, 2], [3, 4, 5]]


def test_a_request_larger_than_a_batch_runs_by_itself():
  batcher, signature = Batcher(Parameters(num_threads=1, max_batch_size=2)), Doubler()
  assert batcher.run(signature, {"x": np.arange(5)}, math.inf)["y"].tolist() == [0, 2, 4, 6, 8]
  assert signature.batches == [[0, 1, 2, 3, 4]]


def test_padding_is_to_allowed_sizes_with_a_row_of_the_batch():
  parameters = Parameters(num_threads=1, max_batch_size=8, allowed_sizes=(1, 4, 8))
  answers, batches = behind_one(parameters, [[1], [2], [3]])
  assert answers == [[2], [4], [6]]
  assert batches == [[1, 2, 3, 3]]


def test_a_request_waits_for_others_no_longer_than_the_timeout():
  batcher, signature = (
    Batcher(Parameters(num_threads=2, max_batch_size=3, timeout_secs=1.0)),
    Doubler(),
  )
  started = time.monotonic()
  answers = ask_all(batcher, signature, [[1], [2]])
  secs = time.monotonic() - started
  assert (answers, signature.batches) == ([[2], [4]], [[1, 2]])
  assert 1 <= secs < 5
  started = time.monotonic()
  ask_all(batcher, signature, [[1], [2], [3]])  # full, so it leaves at once
  assert time.monotonic() - started < 1
  assert signature.batches[1] == [1, 2, 3]


def test_without_a_timeout_nobody_waits():
  batcher, signature = Batcher(Parameters(num_threads=1)), Doubler()
  started = time.monotonic()
  for _ in range(200):
    batcher.run(signature, {"x": np.array([1])}, math.inf)
  secs = (time.monotonic() - started) / 200
  assert secs < 0.01


def test_a_bad_request_fails_alone():
  answers, batches = behind_one(Parameters(num_threads=1), [[1], [-1], [3]])
  assert answers == [[2], grpc.StatusCode.INVALID_ARGUMENT, [6]]
  assert batches == [[1, -1, 3], [1], [-1], [3]]


def test_outputs_that_cannot_be_split_end_batching():
  signature = Doubler(total=True)
  answers, batches = behind_one(Parameters(num_threads=1), [[1], [2]], signature=signature)
  assert answers == [[2], [4]]
  assert batches == [[1, 2], [1], [2]]
  assert not signature.batchable
  answers, batches = behind_one(Parameters(num_threads=1), [[1], [2]], signature=signature)
  assert answers == [[2], [4]]
  assert sorted(batches[-2:]) == [[1], [2]]


def test_other_shapes_and_signatures_are_other_batches():
  batcher, signature, other = Batcher(Parameters(num_threads=1)), Doubler(), Doubler()
  with futures.ThreadPoolExecutor(8) as threads:
    waiting = [hold_up(threads, batcher, signature)]
    waiting += [send(threads, batcher, signature, x) for x in ([1], [[1, 2]], [2], [[3, 4]])]
    waiting.append(send(threads, batcher, other, [7]))
    signature.gate.set()
    answers = [future.result(30)["y"].tolist() for future in waiting]
  assert answers == [[0], [2], [[2, 4]], [4], [[6, 8]], [14]]
  assert signature.batches == [[0], [1, 2], [[1, 2], [3, 4]]]
  assert other.batches == [[7]]


def test_a_full_queue_refuses():
  answers, batches = behind_one(
    Parameters(num_threads=1, max_batch_size=2, max_enqueued_batches=1), [[1], [2], [3], [4]]
  )
  assert answers == [[2], [4], grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNAVAILABLE]
  assert batches == [[1, 2]]


def test_what_is_too_late_is_not_run():
  batcher, signature = Batcher(Parameters(num_threads=1)), Doubler()
  with futures.ThreadPoolExecutor(2) as threads:
    first = hold_up(threads, batcher, signature)
    with pytest.raises(StatusError) as error:
      batcher.run(signature, {"x": np.array([1])}, time.monotonic() + 0.1)
    signature.gate.set()
    first.result(30)
  batcher.run(signature, {"x": np.array([2])}, math.inf)
  assert error.value.code == grpc.StatusCode.DEADLINE_EXCEEDED
  assert signature.batches == [[0], [2]]
  with pytest.raises(StatusError) as error:
    run_alone(signature, {"x": np.array([3])}, time.monotonic() - 1)
  assert error.value.code == grpc.StatusCode.DEADLINE_EXCEEDED
  assert signature.batches == [[0], [2]]


def test_a_thread_outlives_what_it_runs():
  batcher, signature = Batcher(Parameters(num_threads=1)), Doubler()

  def broken(_):
    raise RuntimeError("no StatusError")

  signature.run, run = broken, signature.run
  with pytest.raises(StatusError) as error:
    batcher.run(signature, {"x": np.array([1])}, math.inf)
  assert error.value.code == grpc.StatusCode.INTERNAL and "no StatusError" in error.value.message
  signature.run = run
  assert batcher.run(signature, {"x": np.array([1])}, math.inf)["y"].tolist() == [2]


@pytest.mark.parametrize(
  "inputs, message",
  [
    ({}, "at least one input tensor"),
    ({"x": np.array(1)}, "at least one dimension"),
    ({"x": np.zeros(1), "z": np.zeros(2)}, "equal 0th-dimension size"),
  ],
)
def test_inputs_need_a_common_first_dimension(inputs, message):
  with pytest.raises(StatusError, match=message) as error:
    Batcher(Parameters(num_threads=1)).run(Doubler(), inputs, math.inf)
  assert error.value.code == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
  "values",
  [
    dict(max_batch_size=0),
    dict(num_threads=0),
    dict(max_batch_size=8, allowed_sizes=(4, 2, 8)),
    dict(max_batch_size=8, allowed_sizes=(4,)),
  ],
)
def test_wrong_parameters_are_refused(values):
  with pytest.raises(StatusError):
    Parameters(**values)


def test_many_threads_get_their_own_rows():
  batcher, signature, rng = (
    Batcher(Parameters(num_threads=2, max_batch_size=16)),
    Doubler(),
    np.random.default_rng(0),
  )
  xs = [rng.integers(0, 1000, size) for size in rng.integers(1, 6, 2000)]
  with futures.ThreadPoolExecutor(32) as threads:
    answers = list(threads.map(lambda x: batcher.run(signature, {"x": x}, math.inf)["y"], xs))
  assert all(np.array_equal(answer, 2 * x) for answer, x in zip(answers, xs, strict=True))
  assert len(signature.batches) < len(xs)
  assert max(map(len, signature.batches)) <= 16


def test_stop_runs_what_waits():
  batcher, signature = Batcher(Parameters(num_threads=1)), Doubler()
  with futures.ThreadPoolExecutor(3) as threads:
    waiting = [hold_up(threads, batcher, signature), send(threads, batcher, signature, [1])]
    stopping = threads.submit(batcher.stop)
    time.sleep(0.05)
    assert not stopping.done()
    signature.gate.set()
    stopping.result(30)
    assert [future.result(0.1)["y"].tolist() for future in waiting] == [[0], [2]]

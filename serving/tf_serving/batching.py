"""Batches concurrent requests.

Their rows are concatenated, the model runs once, and its outputs are split again.

Parameters and their meaning are those of TensorFlow Serving's --batching_parameters_file. A batch
is run once it is full or its oldest request has waited for `timeout_secs`, and one of `num_threads`
threads is free. So with a timeout of zero, requests are batched only while all threads are busy,
and none ever waits for others to arrive.
"""

import collections
import dataclasses
import os
import threading
import time
from collections.abc import Mapping, Sequence

import grpc
import numpy as np
import prometheus_client

from serving.tf_serving.servables import Signature
from serving.tf_serving.status import StatusError, invalid

# As in TensorFlow Serving.
_QUEUING_LATENCY = prometheus_client.Histogram(
  ":tensorflow:serving:batching_session:queuing_latency",
  "Wall time (in microseconds) spent in the queue.",
  ["thread_pool_name"],
  buckets=tuple(100 * 1.2**i for i in range(52)),
)

Arrays = Mapping[str, np.ndarray]  # input or output name → array


def run_alone(signature: Signature, inputs: Arrays, deadline: float) -> Arrays:
  """Runs a request by itself, unless its deadline (in time.monotonic) has passed.

  Raises StatusError.
  """
  if time.monotonic() >= deadline:
    raise too_late()
  return signature.run(inputs)


@dataclasses.dataclass(frozen=True)
class Parameters:
  """How requests are batched.

  Attributes:
    max_batch_size: maximum number of rows in a batch; a larger request runs by itself.
    timeout_secs: how long a request waits for others while a thread is free.
    max_enqueued_batches: limit of the queue, in multiples of `max_batch_size` rows; requests beyond
      it are rejected.
    num_threads: batches that run concurrently.
    allowed_sizes: sizes that batches are padded to, ascending and ending with `max_batch_size`; if
      empty, batches are not padded.
  """

  max_batch_size: int = 1000
  timeout_secs: float = 0.0
  max_enqueued_batches: int = 10
  num_threads: int = os.cpu_count() or 1
  allowed_sizes: Sequence[int] = ()

  def __post_init__(self):
    for name in ("max_batch_size", "max_enqueued_batches", "num_threads"):
      if getattr(self, name) < 1:
        raise invalid(f"{name} must be positive, got {getattr(self, name)}.")
    sizes = list(self.allowed_sizes)
    if sizes and (sizes != sorted(set(sizes)) or sizes[0] < 1 or sizes[-1] != self.max_batch_size):
      raise invalid(
        f"allowed_batch_sizes must ascend and end with max_batch_size ({self.max_batch_size}), "
        f"got {sizes}."
      )

  def padded(self, num_rows: int) -> int:
    """Returns the size to which a batch of `num_rows` is padded."""
    return next((size for size in self.allowed_sizes if size >= num_rows), num_rows)


@dataclasses.dataclass(eq=False)
class _Task:
  """A request in a queue; `done` is set once it has its `outputs` or its `error`."""

  signature: Signature
  inputs: Arrays
  num_rows: int
  arrived: float
  outputs: Arrays | None = None
  error: StatusError | None = None
  abandoned: bool = False
  done: threading.Event = dataclasses.field(default_factory=threading.Event)

  def run_alone(self) -> None:
    try:
      self.outputs = self.signature.run(self.inputs)
    except StatusError as error:
      self.error = error


class Batcher:
  """Runs requests in batches.

  A queue holds requests for the same signature of the same version, whose inputs agree in all
  dimensions but the first.
  """

  def __init__(self, parameters: Parameters):
    self._parameters = parameters
    self._changed = threading.Condition()  # guards the queues
    self._queues: collections.OrderedDict[tuple, collections.deque[_Task]] = (
      collections.OrderedDict()
    )
    self._num_rows = 0
    self._latency = _QUEUING_LATENCY.labels("model_server_batch_threads")
    self._stopped = False
    self._threads = [
      threading.Thread(target=self._work, name=f"batch-{i}", daemon=True)
      for i in range(parameters.num_threads)
    ]
    for thread in self._threads:
      thread.start()

  def run(self, signature: Signature, inputs: Arrays, deadline: float) -> Arrays:
    """Runs a request, in a batch with others if there are any.

    Args:
      signature: the signature of the version that answers.
      inputs: name → array [rows, ...], of the correct dtype and shape.
      deadline: in time.monotonic(); a request not started by then is not run.

    Returns:
      Output name → array, with the rows of this request.

    Raises:
      StatusError: DEADLINE_EXCEEDED; UNAVAILABLE if the queue is full; INVALID_ARGUMENT if inputs
        lack a first dimension or differ in it; or the error of the model for this request.
    """
    num_rows = _num_rows(inputs)
    if not 1 <= num_rows <= self._parameters.max_batch_size or not signature.batchable:
      return run_alone(signature, inputs, deadline)
    task = _Task(signature, inputs, num_rows, time.monotonic())
    with self._changed:
      if (
        self._num_rows + num_rows
        > self._parameters.max_batch_size * self._parameters.max_enqueued_batches
      ):
        raise StatusError(
          grpc.StatusCode.UNAVAILABLE,
          "The batch scheduling queue to which this task was submitted is full",
        )
      key = (signature, *((name, value.shape[1:]) for name, value in sorted(inputs.items())))
      self._queues.setdefault(key, collections.deque()).append(task)
      self._num_rows += num_rows
      self._changed.notify()
    if not task.done.wait(min(deadline - time.monotonic(), threading.TIMEOUT_MAX)):
      task.abandoned = True
      raise too_late()
    if task.error:
      raise task.error
    assert task.outputs is not None  # a task that is done has outputs or an error
    return task.outputs

  def stop(self) -> None:
    """Ends the threads once they have run the waiting requests."""
    with self._changed:
      self._stopped = True
      self._changed.notify_all()
    for thread in self._threads:
      thread.join()

  def _work(self) -> None:
    while True:
      with self._changed:
        tasks = self._take()
      if not tasks:
        return
      now = time.monotonic()
      for task in tasks:
        self._latency.observe((now - task.arrived) * 1e6)
      tasks = [task for task in tasks if not task.abandoned]
      try:
        if tasks:
          self._run(tasks)
      except Exception as error:  # the thread must survive, and no client may wait forever
        for task in tasks:
          if task.outputs is None:
            task.error = StatusError(grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}")
      for task in tasks:
        task.done.set()

  def _take(self) -> list[_Task]:
    """Waits for a batch that is due and takes it from its queue; the lock is held.

    Returns an empty list if no request is left after `stop`.
    """
    while self._queues or not self._stopped:
      now, wait = time.monotonic(), None
      for key, queue in self._queues.items():
        due = queue[0].arrived + self._parameters.timeout_secs - now
        if due <= 0 or sum(task.num_rows for task in queue) >= self._parameters.max_batch_size:
          return self._pop(key, queue)
        wait = due if wait is None else min(wait, due)
      self._changed.wait(wait)
    return []

  def _pop(self, key: tuple, queue: collections.deque[_Task]) -> list[_Task]:
    tasks, num_rows = [], 0
    while queue and num_rows + queue[0].num_rows <= self._parameters.max_batch_size:
      tasks.append(queue.popleft())
      num_rows += tasks[-1].num_rows
    self._num_rows -= num_rows
    if queue:
      self._queues.move_to_end(key)  # the next thread serves another queue first
    else:
      del self._queues[key]
    if self._queues:
      self._changed.notify()  # this thread stops watching them
    return tasks

  def _run(self, tasks: Sequence[_Task]) -> None:
    """Sets the outputs or error of each task.

    If the batch fails or cannot be split, each task is run by itself.
    """
    signature = tasks[0].signature
    num_rows = sum(task.num_rows for task in tasks)
    padded = self._parameters.padded(num_rows)
    if len(tasks) == 1 and padded == num_rows:
      return tasks[0].run_alone()
    inputs = {}
    for name in tasks[0].inputs:
      last = tasks[-1].inputs[name]
      # An existing row is valid input; zeros or empty strings may not be.
      padding = np.broadcast_to(last[:1], (padded - num_rows, *last.shape[1:]))
      inputs[name] = np.concatenate([*(task.inputs[name] for task in tasks), padding])
    try:
      outputs = signature.run(inputs)
    except StatusError:
      outputs = None
    if outputs is not None and any(
      not value.ndim or len(value) != padded for value in outputs.values()
    ):
      signature.batchable, outputs = False, None
    start = 0
    for task in tasks:
      if outputs is None:
        task.run_alone()
        task.done.set()
      else:
        task.outputs = {
          name: value[start : start + task.num_rows] for name, value in outputs.items()
        }
      start += task.num_rows


def _num_rows(inputs: Arrays) -> int:
  """Returns the first dimension, which all inputs must share."""
  if not inputs:
    raise invalid("Batching Run() must have at least one input tensor")
  if any(not value.ndim for value in inputs.values()):
    raise invalid("Batching Run() input tensors must have at least one dimension")
  first, *others = (len(value) for value in inputs.values())
  if any(other != first for other in others):
    raise invalid("Batching Run() input tensors must have equal 0th-dimension size")
  return first


def too_late() -> StatusError:
  """Returns the status of a request whose deadline has passed."""
  return StatusError(
    grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed before the request could be run."
  )

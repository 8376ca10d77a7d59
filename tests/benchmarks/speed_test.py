"""The speed benchmark: inputs, the sides' protocol, the check, and the report."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import environments
from benchmarks.speed import cases, inputs, jobs, ours, report, sides
from benchmarks.speed.jobs import EMBEDDING, REALM_STEP, Job
from realm_tf import errors
from realm_tf.corpus import passages
from realm_tf.training import optimizer
from tests.conftest import eagerly
from tests.processes import REPOSITORY

SIZES = {"layers": 1, "hidden": 16}
BATCH, PASSAGES = 3, 40


def case_of(work: str, lengths: str = inputs.REAL, folder: str | None = None) -> cases.Case:
  batch_size = BATCH if work == REALM_STEP else 0
  return cases.Case(
    work, **SIZES, lengths=lengths, batch_size=batch_size, passages=folder, num_passages=PASSAGES
  )


def written(work: str, folder: str) -> tuple[Job, dict[str, np.ndarray]]:
  """Returns a toy job and its inputs."""
  corpus = case_of(work).corpus(folder)
  architecture = inputs.architecture_of(**SIZES, vocabulary_size=corpus.tokenizer.size)
  job = Job(work, folder, dtype="float32", threads=1, architecture=architecture)
  return job, inputs.write(job, corpus, batch_size=BATCH, seed=0)


# ------------------------------------------------------------------------------------------- inputs


def test_full_lengths_have_no_padding(tmp_path):
  corpus = case_of(REALM_STEP, inputs.FULL).corpus(str(tmp_path))
  batches = inputs.realm_batches(corpus, BATCH, seed=0)
  for name, length in (("query", 32), ("passage", 128), ("reader", 160)):
    ids = batches[f"{name}_ids"]
    assert ids.shape[-1] == length and (ids != 0).all(), name
  assert (inputs.packed_passages(corpus)["token_ids"] != 0).all()


def test_real_lengths(toy, tmp_path):
  """Lengths come from the stated distribution, or from a corpus; masks are where they should be."""
  folder = toy.path("passages")
  for corpus in (case_of(REALM_STEP).corpus(str(tmp_path)), case_of("", folder=folder).corpus("")):
    batches = inputs.realm_batches(corpus, BATCH, seed=0)
    assert batches["reader_ids"].shape == (inputs.NUM_BATCHES, BATCH, inputs.CANDIDATES, 160)
    used = batches["target_mask"] > 0
    assert 1 <= used.sum(axis=-1).min() < used.sum(axis=-1).max() <= inputs.USED_MASKS
    for name, ids in (("query", batches["query_ids"]), ("reader", batches["reader_ids"][:, :, 5])):
      masked = np.take_along_axis(ids, batches["mask_positions"], axis=-1)
      assert (masked[used] == corpus.tokenizer.mask_id).all(), name
    sizes = np.count_nonzero(batches["passage_ids"], axis=-1)
    assert (sizes[..., 0] == 3).all() and len(np.unique(sizes)) > 5, "the first is the null passage"
  table, drawn = passages.load(folder), corpus.table
  known = {tuple(ids) for ids in map(table.text_ids.__getitem__, range(len(table)))}
  assert all(tuple(drawn.text_ids[row]) in known for row in range(len(drawn)))


@pytest.mark.parametrize(
  "values, message",
  [
    ({"sizes": ["2-128"]}, "--sizes has '2-128'; wanted layers and width"),
    ({"lengths": ["long"]}, "--lengths has 'long'; wanted full or real"),
    ({"batch_sizes": ["0"]}, "--batch_sizes has '0'; wanted positive numbers"),
  ],
)
def test_a_mistyped_value(values, message):
  given = {"sizes": ["2x128"], "lengths": ["full", "real"], "batch_sizes": ["4", "16"]}
  with pytest.raises(errors.UserError, match=message):
    cases.cases_of(REALM_STEP, **given | values, passages=None, num_passages=8)
  assert len(cases.cases_of(REALM_STEP, **given, passages=None, num_passages=8)) == 4
  (full, real) = cases.cases_of(EMBEDDING, **given, passages="P", num_passages=8)
  assert (full.passages, real.passages) == (None, "P")


@pytest.mark.parametrize(
  "names, message",
  [(["torch"], "--sides has torch; wanted some of ours-float32"), (["torch-float32"], "add ours-")],
)
def test_mistyped_sides(names, message):
  with pytest.raises(errors.UserError, match=message):
    sides.named(names, REALM_STEP)
  assert sides.named([], EMBEDDING) == list(sides.SIDES[EMBEDDING])


# ----------------------------------------------------------------------------------------- protocol


def test_all_sides_have_berts_schedule():
  ours_rate = optimizer.LinearWarmupDecay(
    peak=jobs.PEAK_RATE, steps=jobs.STEPS, warmup_steps=jobs.WARMUP_STEPS
  )
  for step in (0, 1, 9, 10, 50, 100, 120):
    assert jobs.learning_rate(step) == pytest.approx(float(ours_rate(step)), abs=1e-9)


@pytest.mark.parametrize("work", jobs.WORKS)
def test_our_side_answers(work, tmp_path):
  job, arrays = written(work, str(tmp_path))
  with eagerly():
    side = ours.open_side(Job.from_json(job.to_json()))
    path = str(tmp_path / "outputs.npy")
    assert jobs.answer(side, {"outputs": path}) == {}
    reply = jobs.answer(side, {"run": 2})
  assert set(side.versions) == {"tensorflow", "keras"}
  assert reply["seconds"] > 0 and reply["cpu_seconds"] > 0
  outputs = np.load(path)
  if work == REALM_STEP:
    assert outputs.shape == (jobs.CHECKED_STEPS,)
    np.testing.assert_allclose([*outputs, reply["checksum"]], np.log(30_522), rtol=0.05)
  else:
    assert outputs.shape == (len(arrays["token_ids"]), inputs.PROJECTION)
    assert reply["checksum"] == pytest.approx(np.abs(outputs).sum(), rel=1e-5)


_SERVING = """
from benchmarks.speed import jobs
class Side:
  versions = {"counting": "1"}
  def run(self, steps):
    print("a library prints this")
    return steps + 0.5
jobs.serve(jobs.Job("embedding", "", "float32", 1, {}), lambda job: Side())
"""


def test_only_answers_are_on_standard_output():
  done = subprocess.run(
    [sys.executable, "-c", _SERVING],
    input='{"run": 1}\n{"run": 3}\n',
    capture_output=True,
    text=True,
    cwd=REPOSITORY,
    check=True,
  )
  ready, *answers = map(json.loads, done.stdout.splitlines())
  assert ready == {"versions": {"counting": "1"}}
  assert [answer["checksum"] for answer in answers] == [1.5, 3.5]
  assert "a library prints this" in done.stderr


def test_a_side_that_fails(monkeypatch, tmp_path):
  monkeypatch.setattr(environments, "python_of", lambda root, name: sys.executable)
  job = Job(EMBEDDING, str(tmp_path), dtype="float32", threads=1, architecture={})
  process = sides.Process("missing-float32", job, environments_root="")
  with pytest.raises(sides.SideError, match="'missing-float32' ended with exit code 1"):
    process.versions()
  with pytest.raises(sides.SideError, match="ended with exit code 1"):
    process.ask(run=1)
  process.stop()


# -------------------------------------------------------------------------------- check and timing


class Canned:
  """A stand-in for a side's process, with given outputs and seconds for each step."""

  def __init__(self, outputs=(), secs: float = 1.0):
    self.outputs, self.secs, self.asked = np.array(outputs), secs, []

  def ask(self, **request) -> dict:
    if "outputs" in request:
      np.save(request["outputs"], self.outputs)
      return {}
    self.asked.append(request["run"])
    secs = self.secs * request["run"]
    return {"seconds": secs, "cpu_seconds": 1.5 * secs, "checksum": 0.0}


def test_sides_must_compute_the_same(tmp_path):
  reference = Canned([2.0, 4.0])
  close = Canned([2.0, 4.0001])
  found = sides.check({sides.REFERENCE: reference, "torch-float32": close}, str(tmp_path))
  assert found == {sides.REFERENCE: 0, "torch-float32": pytest.approx(2.5e-5)}
  for wrong in ([2.0, 4.01], [2.0, np.nan]):
    both = {sides.REFERENCE: reference, "torch-float32": Canned(wrong)}
    with pytest.raises(sides.SideError, match="torch-float32 does not compute what ours-float32"):
      sides.check(both, str(tmp_path))
  both["torch-bfloat16"] = Canned([2.0, 4.01])
  del both["torch-float32"]
  sides.check(both, str(tmp_path))


def test_differences_of_embeddings_are_by_row():
  wanted = np.array([[3.0, 4.0], [0.0, 1.0]])
  assert sides.difference(wanted + [[0, 0], [0.3, 0.4]], wanted) == pytest.approx(0.5)


def test_turns():
  """A fast side takes more steps in its turn; a slow one takes at least one."""
  both = {sides.REFERENCE: Canned(secs=0.5), "torch-float32": Canned(secs=8)}
  timing = sides.time_in_turn(both, rounds=3, secs=2)
  assert both[sides.REFERENCE].asked == [1, 4, 4, 4]
  assert both["torch-float32"].asked == [1, 1, 1, 1]
  assert timing.rates == {sides.REFERENCE: [2, 2, 2], "torch-float32": [0.125] * 3}
  assert timing.cores["torch-float32"] == [1.5] * 3 and len(timing.loads) == 3


# ------------------------------------------------------------------------------------------- report


def results_of(work: str) -> dict:
  timing = sides.Timing(
    rates={sides.REFERENCE: [2, 3, 6], "torch-float32": [1, 3, 2]},
    cores={sides.REFERENCE: [1.5, 2, 2], "torch-float32": [1, 1.1, 2]},
    loads=[1.5, 3.25, 2],
  )
  row = report.row_of(
    vars(case_of(work)),
    timing=timing,
    size=10,
    gaps={sides.REFERENCE: 0.0, "torch-float32": 2e-6},
    versions={name: {"torch": "2"} for name in timing.rates},
    load_before=1.25,
  )
  about = {**report.machine(), "date": "2026-01-02", "cpu": "a processor", "cores": 2}
  return {"work": work, "command": "a command", "machine": about, "rounds": 3, "rows": [row]}


def test_report(tmp_path):
  results = json.loads(json.dumps(results_of(REALM_STEP)))
  side = results["rows"][0]["sides"]["torch-float32"]
  assert side["rate"] == {"median": 20, "min": 10, "max": 30}
  assert side["ratios"] == {sides.REFERENCE: {"median": 2, "min": 1, "max": 3}}, "paired by round"
  text = report.table_of(results)
  assert "a command\n2026-01-02, a processor, cores: 2\n" in text
  lines = [" ".join(line.split()) for line in text.splitlines()]
  name = "1 x 16, batch 3, real lengths"
  assert f"{name} ours-float32 30 [20, 60] - 2.0 0e+00 1.2, 3.2" in lines
  assert f"{name} torch-float32 20 [10, 30] 2 [1, 3] 1.1 2e-06 1.2, 3.2" in lines
  assert "1 x 16, real lengths" in report.table_of(results_of(EMBEDDING))
  report.plot(results, str(tmp_path / "speed.png"))
  assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------------------------------- peers


def measured(work: str, names: list[str], root: str = "") -> dict:
  return cases.measure(case_of(work), names, rounds=2, secs=0, environments_root=root)


def test_sides_of_ours_run_in_turn():
  row = measured(EMBEDDING, [sides.REFERENCE, "ours-bfloat16"])
  assert 0 < row["sides"]["ours-bfloat16"]["difference"] < 1e-2
  assert all(side["rate"]["min"] > 0 for side in row["sides"].values())


@pytest.mark.parametrize(
  "work, side",
  [(work, side) for work in jobs.WORKS for side in sides.SIDES[work] if sides.environment_of(side)],
)
def test_sides_of_peers_compute_the_same(work, side):
  """In environments that the benchmark made before."""
  root = os.path.join(REPOSITORY, environments.ROOT)
  if not environments.exists(root, sides.environment_of(side)):
    pytest.skip(f"no environment; `python -m benchmarks.speed --work={work}` makes it")
  row = measured(work, [sides.REFERENCE, side], root)
  assert row["sides"][side]["difference"] <= sides.TOLERANCES[sides.dtype_of(side)]
  assert "torch" in row["sides"][side]["versions"]

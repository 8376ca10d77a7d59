"""REALM pre-training on the toy corpus with the real background refresh.

Tests kills, resumes, and inputs that do not fit.
"""

import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest

from beam_jobs import embed_passages
from realm_tf import pretrain, progress, settings
from realm_tf.corpus import passages
from realm_tf.corpus.candidates import NULL_PASSAGE, Found
from realm_tf.corpus.tokenization import Tokenizer
from realm_tf.examples import packing
from realm_tf.models import snapshots
from realm_tf.models.masked_reader import MaskedReader
from realm_tf.retrieval import dense, index
from realm_tf.storage import artifacts
from realm_tf.training import new_models, realm_batches, realm_measures, refresh, refreshed_training
from tests import folders
from tests.processes import REPOSITORY, is_running, wait_until

# ----------------------------------------------------------------------------------- a training run


@dataclasses.dataclass
class Run:
  """A finished run: its metrics, and the candidates of every step.

  The candidates come with the passages that their queries were taken from.
  """

  workdir: str
  last: str
  rows: list[dict]
  numbers: np.ndarray
  own: np.ndarray
  made_with: list[int]  # the step of the index that each step's candidates came from


@pytest.fixture(scope="module")
def run(toy, tmp_path_factory) -> Run:
  """A run of 120 steps on X = Z, slowed down so that the first refresh takes place during them."""
  workdir = str(tmp_path_factory.mktemp("realm"))
  config = toy.config(
    spans=toy.config().knowledge_spans,
    realm__steps=120,
    realm__log_every=10,
    realm__checkpoint_every=60,
    refresh__every_steps=20,
  )
  numbers, own, made_with = [], [], []

  def recorded(indexed, query_ids, **what):
    found = retrieval_candidates(indexed, query_ids, **what)
    if what["null"]:  # not the warm-up's
      numbers.append(found), own.append(what["own_passages"]), made_with.append(indexed.step)

      def indexed_yet():
        return artifacts.latest(os.path.join(workdir, "indexes"))

      if not indexed_yet():
        time.sleep(0.1)
      if len(numbers) == 90:
        wait_until(indexed_yet, "the first refreshed index", timeout_secs=120)
        time.sleep(1.0)  # it is opened in the background
    return found

  retrieval_candidates = dense.candidates
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(realm_measures, "tell_start", lambda *unused: None)  # it has candidates, too
    patch.setattr(dense, "candidates", recorded)
    patch.chdir(REPOSITORY)  # where the refresh job is started
    last = pretrain.pretrain(config, workdir)
  return Run(
    workdir, last, progress.read_metrics(workdir), np.array(numbers), np.array(own), made_with
  )


def test_index_is_refreshed_while_training_goes_on(run):
  end = run.rows[-1]
  assert end["refreshes"] >= 1 and end["steps_during_refreshes"] > 0
  assert [row["step"] for row in run.rows] == list(range(10, 121, 10))
  for before, row in itertools.pairwise(run.rows):
    published = row["step"] // 20 * 20
    assert row["staleness_steps"] == published - row["index_step"] and row["index_step"] % 20 == 0
    assert row["index_age_steps"] == row["step"] - row["index_step"] >= row["staleness_steps"]
    assert row["refreshes"] - before["refreshes"] >= (row["index_step"] > before["index_step"])
    for name in ("staleness_steps", "index_age_steps"):
      assert row[f"max_{name}"] >= max(before[f"max_{name}"], row[name])
  assert (
    end["max_index_age_steps"] >= end["max_staleness_steps"] >= 20
    and run.rows[0]["index_step"] == 0
  )
  assert all(np.isfinite(list(row.values())).all() for row in run.rows)
  assert (
    0 <= end["dev_cloze_recall_at_5"] <= 1
    and 0 < end["null_prior"] < 1
    and end["prior_entropy"] > 0
  )


def test_what_is_logged_is_the_index_that_the_batch_was_made_with(run):
  ages = [step - made_with for step, made_with in enumerate(run.made_with, 1)]
  for row in run.rows:
    step = int(row["step"])
    assert (
      row["index_step"] == run.made_with[step - 1] and row["index_age_steps"] == ages[step - 1]
    ), f"step {step}"
    assert row["max_index_age_steps"] == max(ages[:step]), f"ages up to step {step}: {ages[:step]}"
    assert row["refreshes"] == len(set(run.made_with[:step])) - 1, (
      f"indexes up to step {step}: {run.made_with[:step]}"
    )


class Indexes:
  """A stand-in for a `dense.Swapper` and a `refresh.Refresher`.

  An index of step 20 is ready after step 50.
  """

  running = False

  def __init__(self, *, step: int, folder: str):
    self.step, self.folder = step, folder
    self.current = self._index(0 if step < 50 else 20)

  def _index(self, step: int):
    return types.SimpleNamespace(step=step, folder=os.path.join(self.folder, "none"))

  def advance(self) -> bool:
    self.step += 1
    if self.step == 50:
      self.current = self._index(20)
    return self.step == 50

  def poll(self) -> None:
    pass

  def snapshots_in_use(self) -> set[int]:
    return set()


AHEAD = 7  # batches made before they are needed


def ages_logged(workdir: str, *, start: int, stop: int) -> dict[int, dict]:
  """Returns the counts after each step of a run.

  The run publishes a snapshot every 20 steps and logs every 10.
  """
  indexes = Indexes(step=start, folder=workdir)
  callback = refreshed_training.RefreshCallback(
    lambda step: artifacts.step_folder(workdir, step),
    indexes,
    indexes,
    workdir=workdir,
    step=start,
    every_steps=20,
    recall=lambda indexed: {"recall_of": indexed.step},
  )
  log, found = progress.MetricsLog(workdir, start_step=start), {}
  for step in range(start, start + AHEAD):
    callback.index_for(step)
  for step in range(start, stop):
    callback.index_for(step + AHEAD)
    callback.on_train_batch_end(step)
    found[step + 1] = callback.metrics()
    if (step + 1) % 10 == 0:
      log.write(step + 1, found[step + 1])
  return found


def test_age_and_staleness_of_batches_made_ahead(tmp_path):
  """The index that is ready after step 50 is first used seven steps later.

  Batches before that are older than they seem.
  """
  found = ages_logged(str(tmp_path), start=0, stop=90)
  first = min(step for step, counts in found.items() if counts["index_step"] == 20)
  assert first == 50 + AHEAD + 1, "the first batch that was made with it"
  for step, counts in found.items():
    used = 20 if step >= first else 0
    wanted = {
      "index_step": used,
      "index_age_steps": step - used,
      "staleness_steps": step // 20 * 20 - used,
      "refreshes": float(step >= first),
      "recall_of": used,
    }
    assert {name: counts[name] for name in wanted} == wanted, f"after step {step}"
  assert found[90]["max_index_age_steps"] == 90 - 20 and found[90]["max_staleness_steps"] == 60
  assert (
    found[first - 1]["max_index_age_steps"]
    == first - 1
    > found[first - 1]["max_staleness_steps"]
    == 40
  )


def test_a_run_that_goes_on_keeps_the_largest_ages(tmp_path):
  ages_logged(str(tmp_path), start=0, stop=70)
  found = ages_logged(str(tmp_path), start=60, stop=65)
  assert found[61]["index_age_steps"] == 41 and found[61]["max_index_age_steps"] == 50 + AHEAD, (
    found[61]
  )
  assert found[61]["max_staleness_steps"] == 40 and found[61]["refreshes"] == 1, found[61]


def test_own_passage_is_never_a_candidate_and_null_is_first(run, toy):
  assert run.numbers.shape == (120, 4, 3) and (run.own >= 0).all()
  assert (run.numbers[:, :, 0] == NULL_PASSAGE).all(), run.numbers[:, :, 0]
  assert (run.numbers[:, :, 1:] >= 0).all() and (
    run.numbers[:, :, 1] != run.numbers[:, :, 2]
  ).all(), run.numbers
  assert (run.numbers != run.own).all(), np.argwhere(run.numbers == run.own)


def test_last_snapshot_has_its_index_and_loads(run, toy):
  folder = artifacts.step_folder(os.path.join(run.workdir, "indexes"), 120)
  indexed = dense.load(folder, table=passages.load(toy.config().passages), snapshot=run.last)
  table, tokenizer = indexed.table, snapshots.load_tokenizer(run.last)
  packed = packing.pack_passages(
    *packing.gather_passages(table, np.arange(len(table))), tokenizer=tokenizer, length=44
  )
  np.testing.assert_allclose(
    index.read_embeddings(folder, num_rows=len(table)),
    indexed.retriever.embed_passages(*packed),
    atol=1e-5,
  )
  assert isinstance(snapshots.load_model(run.last, "reader"), MaskedReader) and run.last.endswith(
    "/00000120"
  )
  kept = {
    artifacts.step_of(path)
    for path in artifacts.complete_folders(os.path.join(run.workdir, "snapshots"))
  }
  indexes = {
    artifacts.step_of(path)
    for path in artifacts.complete_folders(os.path.join(run.workdir, "indexes"))
  }
  assert 120 in indexes <= kept | {0}, "an index needs its snapshot"
  assert len(kept) < 6


def test_training_moves_both_models(run, toy):
  warm = os.path.join(run.workdir, "warmup/snapshots/00000002")
  for name in ("retriever", "reader"):
    before, after = (
      snapshots.load_model(folder, name).trainable_weights for folder in (warm, run.last)
    )
    moved = [
      float(np.abs(np.array(a) - np.array(b)).max()) for a, b in zip(before, after, strict=True)
    ]
    assert np.median(moved) > 1e-3, name


# ----------------------------------------------------------------------------------- kill and rerun


def trainer_command(toy, workdir: str, *overrides: str) -> list[str]:
  return [
    sys.executable,
    "-m",
    "realm_tf.pretrain",
    f"--config={toy.config_path}",
    f"--workdir={workdir}",
    *(f"--config.{override}" for override in overrides),
  ]


def processes_with(words: str) -> list[int]:
  """Returns the processes whose command line has these words."""
  found = []
  for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
      with open(f"/proc/{pid}/cmdline", "rb") as file:
        if words.encode() in file.read():
          found.append(int(pid))
    except OSError:
      pass
  return found


def test_killed_trainer_takes_its_job_along_and_goes_on(toy, tmp_path):
  workdir = str(tmp_path / "realm")
  command = trainer_command(
    toy,
    workdir,
    "dev_clozes=",  # their measurements take longer than the training
    "warmup.steps=0",
    "realm.steps=60",
    "realm.checkpoint_every=10",
    "refresh.every_steps=20",
  )
  trainer = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL)
  wait_until(
    lambda: artifacts.latest(os.path.join(workdir, "checkpoints")),
    "the first checkpoint",
    timeout_secs=120,
  )
  jobs = processes_with(f"--parent_pid={trainer.pid}")
  trainer.send_signal(signal.SIGKILL)
  trainer.wait()
  before = {row["step"]: row["loss"] for row in progress.read_metrics(workdir)}
  kept = artifacts.step_of(artifacts.latest(os.path.join(workdir, "checkpoints")))
  done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
  assert done.returncode == 0 and f"resuming from step {kept} of 60" in done.stderr, done.stderr
  assert len(jobs) == 1 and 10 <= kept <= max(before) < 60
  wait_until(lambda: not is_running(jobs[0]), "the end of the dead trainer's job", timeout_secs=30)
  rows = progress.read_metrics(workdir)
  assert [row["step"] for row in rows] == list(range(2, 61, 2))
  assert all(row["loss"] == before[row["step"]] for row in rows if row["step"] <= kept)
  assert artifacts.is_complete(
    os.path.join(workdir, "snapshots/00000060")
  ) and artifacts.is_complete(os.path.join(workdir, "indexes/00000060"))
  assert not processes_with(f"--snapshots={workdir}/snapshots"), "no job outlives its trainer"


# -------------------------------------------------------------------------------- mistakes of users


def test_mistyped_overrides(toy, tmp_path):
  mistakes = {
    "realm.stepz=3": ["unknown config key: 'stepz'", 'Did you mean "steps"'],
    "realm.steps=abc": ["config.realm.steps=abc", "invalid literal for int"],
  }
  started = [
    subprocess.Popen(
      trainer_command(toy, str(tmp_path / "W"), override),
      cwd=REPOSITORY,
      stderr=subprocess.PIPE,
      text=True,
    )
    for override in mistakes
  ]
  for trainer, words in zip(started, mistakes.values(), strict=True):
    told = trainer.communicate()[1]
    assert (
      trainer.returncode != 0 and all(part in told for part in words) and "Traceback" not in told
    ), told
  assert not os.path.exists(tmp_path / "W")


def test_fewer_passages_than_candidates(toy, tmp_path):
  table = passages.load(toy.config().passages)
  # 31 and the own one
  settings.batches(toy.config(realm__num_candidates=32)).realm.check_corpus(table)
  without = toy.config(realm__num_candidates=33, realm__drop_own_passage=False)
  settings.batches(without).realm.check_corpus(table)
  with pytest.raises(
    artifacts.UserError,
    match="has 32 passages, realm.num_candidates=33 needs at least 33: lower num_candidates",
  ):
    pretrain.pretrain(toy.config(realm__num_candidates=33), str(tmp_path))
  assert not os.listdir(tmp_path)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory) -> str:
  """Passages of another vocabulary, with a snapshot and its index."""
  root = str(tmp_path_factory.mktemp("stranger"))
  folder = folders.make_passages(os.path.join(root, "passages"), num_passages=20, num_shards=1)
  snapshot = folders.publish_snapshot(os.path.join(root, "snapshots"), 0, vocab=folder)
  embed_passages.embed(
    os.path.join(root, "indexes/00000000"),
    snapshot=snapshot,
    passages_folder=folder,
    jit_compile=False,
  )
  return root


def refused(call, *words: str) -> None:
  """Checks that a call raises an ArtifactError that has all of these words."""
  with pytest.raises(artifacts.ArtifactError) as caught:
    call()
  for part in words:
    assert part in str(caught.value), part


def fingerprint(folder: str) -> str:
  return artifacts.read_info(folder)["fingerprint"]


def test_index_with_another_snapshot_or_other_passages(toy, stranger):
  own, other = toy.path("ict/indexes/00000000"), f"{stranger}/indexes/00000000"
  snapshot, foreign = toy.path("ict/snapshots/00000000"), f"{stranger}/snapshots/00000000"
  folder = toy.config().passages
  table = passages.load(folder)
  refused(
    lambda: dense.load(own, table=table, snapshot=foreign),
    f"was made from snapshot {fingerprint(snapshot)}",
    f"wanted {fingerprint(foreign)}",
  )
  refused(
    lambda: dense.load(other, table=table, snapshot=foreign),
    f"was made from passages {fingerprint(stranger + '/passages')}",
    f"wanted {fingerprint(folder)}",
  )
  refused(
    lambda: dense.load(snapshot, table=table, snapshot=snapshot),
    "holds snapshot, wanted index",
  )
  assert dense.load(own, table=table, snapshot=snapshot).searcher.num_rows == 32


def test_spans_and_warm_start_of_another_vocabulary(toy, stranger, tmp_path):
  config = toy.config(passages=f"{stranger}/passages", retriever__passage_length=40)
  got, wanted = Tokenizer(toy.config().passages).fingerprint, Tokenizer(config.passages).fingerprint
  words = (f"was made with vocabulary {got}", f"this run has {wanted}")
  table, tokenizer = passages.load(config.passages), passages.load_tokenizer(config.passages)
  refused(
    lambda: realm_batches.Batches(settings.batches(config), table, tokenizer), "spans", *words
  )
  reader = new_models.new_masked_reader(
    settings.masked_reader_start(toy.config()), passages.load_tokenizer(toy.config().passages)
  )
  snapshots.publish(
    str(tmp_path / "snapshots"),
    1,
    {"reader": reader},
    tokenizer=passages.load_tokenizer(toy.config().passages),
    made_by="test",
  )
  config.mlm.update(steps=1, workdir=str(tmp_path))
  for make, start in (
    (new_models.new_masked_reader, settings.masked_reader_start(config)),
    (new_models.new_retriever, settings.retriever_start(config)),
  ):
    refused(lambda make=make, start=start: make(start, tokenizer), "snapshot", *words)


def test_a_retriever_starts_from_the_masked_lm_or_from_fresh_weights(toy, tmp_path):
  config, tokenizer = toy.config(), passages.load_tokenizer(toy.config().passages)
  reader = new_models.new_masked_reader(settings.masked_reader_start(config), tokenizer)
  snapshots.publish(
    str(tmp_path / "snapshots"), 1, {"reader": reader}, tokenizer=tokenizer, made_by="test"
  )
  config.mlm.update(steps=1, workdir=str(tmp_path))
  wanted = reader.encoder.get_weights()
  for from_mlm in (True, False):
    config.ict.from_mlm = from_mlm
    got = new_models.new_retriever(
      settings.retriever_start(config), tokenizer
    ).query_tower.encoder.get_weights()
    gap = max(np.abs(one - other).max() for one, other in zip(got, wanted, strict=True))
    assert (gap == 0) == from_mlm


def test_a_workdir_that_was_warmed_up_with_another_retriever(run, toy, monkeypatch):
  config = toy.config(spans=toy.config().knowledge_spans)
  job = settings.refresh_job(config)
  first = pretrain.first_index(config.realm.init, job, passages.load(job.passages))
  other = dataclasses.replace(
    first,
    retriever=new_models.new_retriever(
      settings.retriever_start(config), passages.load_tokenizer(config.passages)
    ),
  )
  monkeypatch.setattr(pretrain, "first_index", lambda init, job, table: other)
  refused(
    lambda: pretrain.pretrain(config, run.workdir),
    "warmup/snapshots/00000002' was warmed up with another retriever than",
    "Give another workdir",
  )


def test_retriever_to_start_from_is_missing(toy, tmp_path):
  refused(
    lambda: pretrain.first_index(
      str(tmp_path / "nothing"),
      settings.refresh_job(toy.config()),
      passages.load(toy.config().passages),
    ),
    "no snapshot in",
    "run realm_tf.pretrain_ict first",
  )
  config = toy.config()
  config.mlm.update(steps=1, workdir=str(tmp_path / "nothing"))
  refused(
    lambda: new_models.new_retriever(settings.retriever_start(config), Tokenizer(config.passages)),
    "run realm_tf.pretrain_mlm first, or set mlm.steps to 0",
  )


# --------------------------------------------------------------------------------------- candidates


class Given:
  """A stand-in for an IndexedRetriever, with the same numbers for every query."""

  def __init__(self, rows):
    self.rows = np.array(rows, np.int32)
    self.num_rows = 7
    self.table = types.SimpleNamespace(deleted=np.array([6]))

  def search(self, query_ids, num):
    return Found(self.rows[:, :num], np.zeros([len(self.rows), num], np.float32))


@pytest.mark.parametrize(
  "num, own, null, wanted",
  [
    (3, [5, 9], True, [[-1, 3, 4], [-1, 5, 3]]),
    (3, [5, 9], False, [[3, 4, 6], [5, 3, 4]]),
    (3, None, True, [[-1, 5, 3], [-1, 5, 3]]),
    (1, [5, 9], True, [[-1], [-1]]),
    (2, [-1, 5], False, [[5, 3], [3, 4]]),
  ],
)
def test_candidates(num, own, null, wanted):
  got = dense.candidates(
    Given([[5, 3, 4, 6]] * 2),
    np.zeros([2, 4], np.int32),
    num=num,
    null=null,
    own_passages=None if own is None else np.array(own)[:, None],
  )
  assert got.dtype == np.int32 and got.tolist() == wanted


@pytest.mark.parametrize(
  "num, null, wanted",
  [
    (4, True, [[-1, 2, 3, 4], [-1, 4, 1, 5]]),  # the second query's own passage is 3
    (2, True, [[-1, 2], [-1, 4]]),
    (3, False, [[2, 3, 4], [4, 1, 5]]),
  ],
)
def test_given_candidates_stand_before_those_retrieved(num, null, wanted):
  """Given passages replace the worst retrieved ones, and are not retrieved as well."""
  given = np.array([[2, NULL_PASSAGE, NULL_PASSAGE], [4, 1, NULL_PASSAGE]])[:, : num - null + 1]
  given[0, 1] = 6  # was deleted by an update
  got = dense.candidates(
    Given([[3, 4, 2, 5, 1, 0], [5, 3, 4, 2, 1, 0]]),
    np.zeros([2, 4], np.int32),
    num=num,
    null=null,
    own_passages=np.array([[NULL_PASSAGE], [3]]),
    given=given,
  )
  assert got.tolist() == wanted


def test_candidates_may_be_drawn_from_a_pool_of_the_best():
  """The best come first, none twice, and none from beyond the pool.

  A given passage has its place beside them.
  """
  rows = [[5, 3, 4, 6, 2, 1, 0]] * 2
  own, given = np.array([[3], [NULL_PASSAGE]]), np.array([[4], [NULL_PASSAGE]])
  drawn = set()
  for seed in range(60):
    got = dense.candidates(
      Given(rows),
      np.zeros([2, 4], np.int32),
      num=4,
      null=True,
      own_passages=own,
      given=given,
      pool=3,
      rng=np.random.default_rng(seed),
    )
    assert got[0, :2].tolist() == [-1, 4] and got[1].tolist() == [-1, 5, 3, 4], (
      "a pool of three for three places"
    )
    drawn.add(tuple(got[0, 2:]))
  assert drawn == {(5, 6), (5, 2), (6, 2)}


def test_copies_of_a_passage_are_dropped_with_it():
  got = dense.candidates(
    Given([[5, 3, 4, 6, 2, 1]] * 2),
    np.zeros([2, 4], np.int32),
    num=4,
    null=True,
    own_passages=np.array([[3, 5], [4, NULL_PASSAGE]]),
  )
  assert got.tolist() == [[-1, 4, 6, 2], [-1, 5, 3, 6]]
  few = Given([[1, 0]] * 2)
  few.num_rows = 2
  got = dense.candidates(
    few,
    np.zeros([2, 4], np.int32),
    num=3,
    null=True,
    own_passages=np.array([[1, 0], [1, NULL_PASSAGE]]),
  )
  assert got.tolist() == [[-1, -1, -1], [-1, 0, -1]], "what is missing counts as the null passage"


def test_no_candidate_is_the_own_passage_where_x_overlaps_z(toy, overlapping, monkeypatch):
  """Holds in REALM's steps and in those of the warm-up, which reads the own passage on purpose."""
  config = toy.config(
    spans=overlapping, knowledge_spans=overlapping, realm__num_candidates=32, realm__batch_size=8
  )
  table, tokenizer = passages.load(config.passages), passages.load_tokenizer(config.passages)
  indexed = dense.load(
    toy.path("ict/indexes/00000000"),
    table=table,
    snapshot=toy.path("ict/snapshots/00000000"),
  )
  batches, kept = realm_batches.Batches(settings.batches(config), table, tokenizer), []
  monkeypatch.setattr(
    batches,
    "_pack",
    lambda queries, query_ids, numbers, table: kept.append((queries.own_passages[:, 0], numbers)),
  )
  for step in range(8):
    batches.realm(step, indexed=indexed)
    own, numbers = kept[-1]
    for row, others in zip(own, numbers, strict=True):
      wanted = set(range(len(table))) - {row}
      assert row not in others[1:] and set(others[1:]) <= wanted, (
        f"own passage {row}, candidates {others}"
      )
      assert row == NULL_PASSAGE or set(others[1:]) == wanted, "all others of the 32 passages"
    batches.masked_lm(2 * step, batch_size=8, pretraining_every=2)
    own, numbers = kept[-1]
    assert numbers.tolist() == own[:, None].tolist() and (own != NULL_PASSAGE).any(), (
      "its own, intact passage"
    )
    batches.masked_lm(2 * step + 1, batch_size=8, pretraining_every=2, indexed=indexed)
    own, numbers = kept[-1]
    assert ((numbers[:, 0] != own) & (numbers[:, 0] >= 0)).all(), "the best other one"


@pytest.mark.parametrize(
  "job_args",
  [(), ("--mixed_precision",), ("--mixed_precision", "--keep=3", "--", "--direct_num_workers=1")],
)
def test_the_index_that_is_evaluated_is_computed_in_float32(toy, tmp_path, monkeypatch, job_args):
  """This holds for any arguments of the refresh job.

  absl takes the last of two flags, and Beam's options end them.
  """
  seen = []
  monkeypatch.setattr(
    refresh.subprocess,
    "run",
    lambda command, **how: seen.append(command) or refresh.subprocess.CompletedProcess(command, 0),
  )
  job = settings.refresh_job(toy.config(refresh__job_args=job_args))
  refresh.make_index(job, "W")
  ours, _, beam = " ".join(seen[0]).partition(" -- ")
  assert ours.endswith(" --nomixed_precision") and beam == " ".join(job_args).partition("-- ")[2]
  assert ours.split().index("--nomixed_precision") > max(
    [i for i, arg in enumerate(ours.split()) if arg == "--mixed_precision"], default=0
  )


def test_candidates_where_scann_finds_too_few():
  """A missing passage counts as the null passage.

  The same holds for sentences that are in no passage of the corpus.
  """
  got = dense.candidates(
    Given([[5, NULL_PASSAGE, NULL_PASSAGE, NULL_PASSAGE], [5, 3, 4, 6]]),
    np.zeros([2, 4], np.int32),
    num=4,
    null=True,
    own_passages=np.array([[NULL_PASSAGE], [3]]),
  )
  assert got.tolist() == [[-1, 5, -1, -1], [-1, 5, 4, 6]]

"""REALM pre-training: the retriever and the reader learn together from masked salient spans (REALM, section 3).

    python -m realm_tf.pretrain --config=configs/quickstart.py --workdir=runs/quickstart/realm

Before the first REALM step the reader may be warmed up on one passage each (`config.warmup`), and the first index is built.
While training goes on, a background job re-embeds the corpus from the newest snapshot; the trainer takes over each new index
between two steps and never waits. Run again with the same workdir, it goes on where it stopped.
"""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable

import keras
import numpy as np

from realm_tf import (
    artifacts, examples, index, metrics, ownership, passages, paths, questions, refresh, retrieval, settings, snapshots,
    training)
from realm_tf.models.masked_reader import MaskedReader
from realm_tf.models.realm import RETRIEVER_LOSSES, RealmModel
from realm_tf.models.retriever import Retriever
from realm_tf.optimizer import bert_optimizer
from realm_tf.progress import read_metrics
from realm_tf.recurring_spans import HELD_OUT_RECALL

SAMPLINGS = ("sentences", "passages")  # what an epoch has once each
_START_CLOZES = 256  # held-out clozes that tell what REALM starts with
_ENOUGH_READ, _ENOUGH_UTILITY = 0.4, 0.2  # share of them whose answer is read, and nats; REALM hardly learns from less

# =============================================================================================================== data


class Batches:
  """Training step → batch, from the parts that warm-up and REALM share.

  Args:
    config: the whole config.
    table: the knowledge corpus.
  """

  def __init__(self, config, table: passages.PassageTable, tokenizer):
    self.config, self.table, self.tokenizer = config, table, tokenizer
    self.sentences = self._read(config.spans)
    same = paths.resolve(config.spans) == paths.resolve(config.knowledge_spans)  # X is Z
    self.knowledge_sentences = self.sentences if same else self._read(config.knowledge_spans)
    asked = config.realm.holders or config.realm.with_holders
    if asked and config.masking == "salient" and not self.sentences.num_with_holders:
      print(
          f"WARNING: no span of {config.spans!r} stands in few enough other passages: REALM goes without holders.",
          file=sys.stderr, flush=True)

  def _read(self, folder: str) -> examples.MaskedSentences:
    return settings.masked_sentences(self.config, folder, self.table, self.tokenizer)

  def masked_lm(self, step: int, *, batch_size: int, pretraining_every: int, holders: float = 0.0,
                indexed: retrieval.IndexedRetriever | None = None) -> dict[str, np.ndarray]:
    """One passage each, for the masked-LM stages, in which the reader learns to copy from a passage.

    Most steps: masked sentences of the knowledge corpus with their own, intact passages. Every so many steps: masked
    sentences of the pre-training corpus with the best passage of `indexed`, or with the null passage where it is None.

    Args:
      holders: share of each batch that is read with another passage that holds the masked span instead.
    """
    own = step % pretraining_every != pretraining_every - 1
    source, seed = self.knowledge_sentences if own else self.sentences, self.config.seed + 1
    rng = np.random.default_rng([seed, 23, step])
    queries = self.cropped(source.batch(step, batch_size=batch_size, seed=seed, with_holders=holders), rng)
    query_ids = self._pack_queries(queries)
    if own:
      numbers = queries.own_passages[:, :1]
    elif indexed is None:
      numbers = np.full([batch_size, 1], examples.NULL_PASSAGE)
    else:
      numbers = retrieval.candidates(indexed, query_ids, num=1, own_passages=queries.own_passages, null=False)
    num_held = round(holders * batch_size)
    drawn = examples.draw_holders(queries, 1, rng)
    return self._pack(queries, query_ids, np.concatenate([drawn[:num_held], numbers[num_held:]]))

  def realm(self, step: int, *, indexed: retrieval.IndexedRetriever) -> dict[str, np.ndarray]:
    """Masked sentences of the pre-training corpus with the candidates that the index gives them.

    At first, `realm.holders` of the candidates are passages that are known to hold the masked span. Each of them gives way to
    a retrieved one with a probability that grows from 0 to 1 over the first half of the training. The last
    `realm.own_passages` of the batch keep their own passage among the candidates; it is one of those given.
    """
    section, seed = self.config.realm, self.config.seed + 2
    queries = self.sentences.batch(
        step, batch_size=section.batch_size, seed=seed, by_passage=section.sampling == "passages",
        with_holders=section.with_holders)
    rng = np.random.default_rng([seed, 29, step])
    queries = self.cropped(queries, rng)
    num_own = round(section.own_passages * section.batch_size)
    keeps_own = np.arange(section.batch_size) >= section.batch_size - num_own
    given = examples.draw_holders(queries, section.holders, rng)
    if num_own and section.holders:
      given[keeps_own, 0] = queries.own_passages[keeps_own, 0]
    share = max(0.0, 1 - 2 * step / max(section.steps, 1))
    given = np.where(rng.random(given.shape) < share, given, examples.NULL_PASSAGE)
    return self.with_candidates(queries, indexed=indexed, given=given, keeps_own=keeps_own, rng=rng)

  def with_candidates(self, queries: examples.MaskedQueries, *, indexed: retrieval.IndexedRetriever, given: np.ndarray,
                      rng: np.random.Generator, keeps_own: np.ndarray | bool = False) -> dict[str, np.ndarray]:
    """What REALM reads for masked queries.

    Args:
      rng: of the draw from `realm.pool`.
      given: [B, G] candidates besides the null passage and those that the index gives; then NULL_PASSAGE.
      keeps_own: [B] bool, whose own passage may be a candidate whatever `realm.drop_own_passage` says.
    """
    section, query_ids = self.config.realm, self._pack_queries(queries)
    dropped = np.where(np.reshape(keeps_own, [-1, 1]), examples.NULL_PASSAGE, queries.own_passages)
    numbers = retrieval.candidates(
        indexed, query_ids, num=section.num_candidates, null=section.null_passage, given=given,
        own_passages=dropped if section.drop_own_passage else None, pool=section.pool, rng=rng)
    batch = self._pack(queries, query_ids, numbers)
    if section.batch_candidates:
      batch["unread"] = examples.unread_passages(queries, numbers)
    if section.needs_evidence:
      batch["evidence"] = examples.evidence(batch, tokenizer=self.tokenizer)
    return batch

  def cropped(self, queries: examples.MaskedQueries, rng: np.random.Generator) -> examples.MaskedQueries:
    """Masked sentences as `realm.query_words` asks for them."""
    words = self.config.realm.query_words
    return examples.crop_queries(queries, words, tokenizer=self.tokenizer, rng=rng) if words else queries

  def _pack_queries(self, queries: examples.MaskedQueries) -> np.ndarray:
    return examples.pack_queries(queries.ids.tensor(), tokenizer=self.tokenizer, length=self.config.retriever.query_length).numpy()

  def _pack(self, queries, query_ids, numbers):
    return examples.realm_batch(
        queries, query_ids, numbers, self.table, tokenizer=self.tokenizer, query_length=self.config.retriever.query_length,
        passage_length=self.config.retriever.passage_length, reader_length=self.config.reader.length,
        title_length=self.config.retriever.title_length)


# ============================================================================================================ refresh


class RefreshCallback(keras.callbacks.Callback):
  """Publishes snapshots, watches the refresh job, takes over new indexes, and counts what happened.

  Batches are made some steps before they are trained on. What is counted is the index that the batch
  of a step was made with: its age, trainer steps since its snapshot, and its staleness, trainer steps
  between the newest snapshot and its own.

  Args:
    write_snapshot: publishes W/snapshots/<step>, given the step; returns the folder.
    swapper: holds the newest index; asked after every step whether a newer one is ready.
    recall: measures retrieval on held-out clozes with an index.

  Attributes:
    used: the index that the last batch was made with.
  """

  def __init__(self, write_snapshot: Callable[[int], str], swapper: retrieval.Swapper, refresher: refresh.Refresher, *, workdir: str,
               step: int, every_steps: int, recall: Callable[[retrieval.IndexedRetriever], dict]):
    super().__init__()
    self.write_snapshot, self.swapper, self.refresher, self.measure_recall = write_snapshot, swapper, refresher, recall
    self.workdir, self.step, self.every_steps = workdir, step, every_steps
    self.snapshot_step = step // every_steps * every_steps
    self.used = swapper.current
    self._made_with: dict[int, retrieval.IndexedRetriever] = {}  # step -> index; not trained on yet
    names = ("refreshes", "steps_during_refreshes", "index_age_steps", "max_index_age_steps",
             "staleness_steps", "max_staleness_steps")
    self.counts = dict.fromkeys(names, 0.0)
    for row in read_metrics(workdir):
      if row["step"] <= step:
        self.counts.update({name: row[name] for name in self.counts if name in row})
    self.recall = recall(self.used)

  def index_for(self, step: int) -> retrieval.IndexedRetriever:
    """The index to make the batch of a step with, counted from 0; noted until it is trained on."""
    self._made_with[step] = self.swapper.current
    return self._made_with[step]

  def on_train_batch_end(self, batch, logs=None):
    used = self._made_with.pop(self.step)
    self.step += 1
    self.refresher.poll()
    self.counts["steps_during_refreshes"] += self.refresher.running
    if self.step % self.every_steps == 0:
      self.publish()
    self.swapper.advance()
    if used is not self.used:
      self.used = used
      self.counts["refreshes"] += 1
      self.recall = self.measure_recall(used)
    for name, step in (("index_age_steps", self.step), ("staleness_steps", self.snapshot_step)):
      self.counts[name] = step - used.step
      self.counts[f"max_{name}"] = max(self.counts[name], self.counts[f"max_{name}"])

  def publish(self) -> str:
    """Writes W/snapshots/<step> and deletes those that nothing uses any more."""
    folder = self.write_snapshot(self.step)
    self.snapshot_step = self.step
    artifacts.prune(os.path.dirname(folder), newest=1, keep_steps=self.refresher.snapshots_in_use() | {self.swapper.current.step})
    return folder

  def metrics(self) -> dict[str, float]:
    """For metrics.jsonl: the counts; of the index used its step, recall and what its refresh took."""
    info = artifacts.read_info(self.used.folder) if artifacts.is_complete(self.used.folder) else {}
    took = {name: info[name] for name in ("refresh_secs", "passages_per_sec") if name in info}
    return {**self.counts, "index_step": self.used.step, **took, **self.recall}


def first_index(config) -> retrieval.IndexedRetriever:
  """The index that training starts from: of the newest snapshot in `config.realm.init`, built if it is not there yet."""
  root, snapshot_root = (os.path.join(config.realm.init, name) for name in ("indexes", "snapshots"))
  snapshot = snapshots.newest(config.realm.init, advice="run realm_tf.pretrain_ict first (steps=0 gives a fresh retriever).")
  folder = artifacts.step_folder(root, artifacts.step_of(snapshot))
  make_index(config, snapshots_root=snapshot_root, indexes=root)
  found = retrieval.load(folder, passages=config.passages, snapshot=snapshot)
  return dataclasses.replace(found, step=0)


def make_index(config, *, snapshots_root: str, indexes: str) -> None:
  """Runs the refresh job once, in its own process; returns at once where the newest snapshot's index is there.

  The index is one to start from or to evaluate with: it is computed in float32, whatever `job_args` say.

  Raises:
    UserError: the job failed; its own words stand above.
  """
  args = list(config.refresh.job_args)
  beam_args = args[args.index("--"):] if "--" in args else []
  done = subprocess.run(
      [sys.executable, "-m", "beam_jobs.refresh_index", f"--snapshots={snapshots_root}", f"--passages={config.passages}",
       f"--indexes={indexes}", f"--searcher={config.searcher}", f"--parent_pid={os.getpid()}",
       *args[:len(args) - len(beam_args)], "--nomixed_precision", *beam_args],
      check=False, start_new_session=True)  # a group of its own: it ends with this process, however that ends
  if done.returncode:
    raise artifacts.UserError(f"the refresh job ended with code {done.returncode}; its own words stand above.")


def newest_index(config, workdir: str, first: retrieval.IndexedRetriever) -> retrieval.IndexedRetriever:
  """The index to go on with after a restart: W's newest whose snapshot is still there, or the first."""
  for folder in reversed(artifacts.complete_folders(os.path.join(workdir, "indexes"))):
    snapshot = artifacts.step_folder(os.path.join(workdir, "snapshots"), artifacts.step_of(folder))
    if artifacts.is_complete(snapshot):
      return retrieval.load(folder, passages=config.passages, snapshot=snapshot)
  return first


# =========================================================================================================== training


def warm_up(config, workdir: str, batches: Batches, reader: MaskedReader, first: retrieval.IndexedRetriever, tokenizer) -> str:
  """Trains the reader alone on one passage each and publishes it with the first retriever; returns the snapshot."""
  if done := artifacts.latest(os.path.join(workdir, "snapshots")):
    snapshots.load_weights(reader, os.path.join(done, "reader.weights.h5"))
    return done
  train_masked_lm(config, config.warmup, workdir, batches, reader, indexed=first)
  return snapshots.publish(os.path.join(workdir, "snapshots"), config.warmup.steps, {"retriever": first.retriever, "reader": reader},
                           tokenizer=tokenizer, made_by="pretrain warm-up")


def train_masked_lm(config, section, workdir: str, batches: Batches, reader: MaskedReader,
                    indexed: retrieval.IndexedRetriever | None = None) -> None:
  """REALM with one given passage: trains the reader alone."""
  if section.steps:
    with settings.scope(config):
      model = RealmModel(None, reader)
      optimizer = bert_optimizer(
          learning_rate=section.learning_rate, steps=section.steps, **config.optimizer)
    training.train(
        model, lambda step: batches.masked_lm(
            step, batch_size=section.batch_size, pretraining_every=section.pretraining_every, holders=section.holders,
            indexed=indexed),
        workdir=workdir, steps=section.steps, log_every=section.log_every, checkpoint_every=section.checkpoint_every,
        batch_size=section.batch_size, jit_compile=config.jit_compile, optimizer=optimizer)


def pretrain(config, workdir: str) -> str:
  """Warms the reader up, trains retriever and reader together, and leaves a snapshot with its index.

  Returns:
    The last snapshot's folder; its index has the same number under W/indexes.

  Raises:
    ArtifactError: inputs missing, or not belonging together.
    UserError: a corpus of fewer passages than candidates, or a setting that there is not.
  """
  keras.utils.set_random_seed(config.seed)
  training.check_workdir(workdir, config.realm.steps)
  ownership.check_numbered(os.path.join(workdir, "indexes"), kind=index.KIND)
  check_settings(config.realm)
  table = passages.load(config.passages)
  tokenizer = settings.tokenizer(config.passages)
  check_corpus(config, table)
  first = first_index(config)
  batches = Batches(config, table, tokenizer)
  reader = settings.new_masked_reader(config, tokenizer)
  warm = warm_up(config, os.path.join(workdir, "warmup"), batches, reader, first, tokenizer)

  section, roots = config.realm, {name: os.path.join(workdir, name) for name in ("snapshots", "indexes")}
  with settings.scope(config):
    retriever = snapshots.load_retriever(warm)
    check_warm_up(warm, retriever, first.retriever, config.realm.init)
    model = RealmModel(
        retriever, reader, per_token=section.per_token, null=section.null_passage, batch_candidates=section.batch_candidates,
        retriever_loss=section.retriever_loss)
    optimizer = bert_optimizer(
        learning_rate=section.learning_rate, steps=section.steps, slow=retriever.trainable_variables,
        slow_factor=section.retriever_learning_rate_ratio, **config.optimizer)
  step = training.checkpoint_step(workdir)
  if not step:
    tell_start(model, batches, first)
  for root in roots.values():
    artifacts.remove_after(root, step)
  matcher = metrics.AnswerMatcher(table.texts)
  with refresh.Refresher(**roots, passages=config.passages, log=os.path.join(workdir, "refresh.log"), searcher=config.searcher,
                         start_job=config.refresh.start_job, job_args=config.refresh.job_args) as refresher:
    swapper = retrieval.Swapper(newest_index(config, workdir, first), newest_index=refresher.newest_index,
                                snapshots_root=roots["snapshots"], passages=config.passages)
    write_snapshot = lambda step: snapshots.publish(
        roots["snapshots"], step, {"retriever": retriever, "reader": reader}, tokenizer=tokenizer, made_by="pretrain")
    refreshing = RefreshCallback(
        write_snapshot, swapper, refresher, workdir=workdir, step=step, every_steps=config.refresh.every_steps,
        recall=recall_of(config, batches.sentences, tokenizer, matcher))
    training.train(
        model, lambda step: batches.realm(step, indexed=refreshing.index_for(step)),
        workdir=workdir, steps=section.steps, log_every=section.log_every,
        checkpoint_every=section.checkpoint_every, batch_size=section.batch_size,
        jit_compile=config.jit_compile, optimizer=optimizer, extra_metrics=refreshing.metrics,
        callbacks=[refreshing])
  last = artifacts.step_folder(roots["snapshots"], section.steps)
  if not artifacts.is_complete(last):
    last = refreshing.publish()
  make_index(config, snapshots_root=roots["snapshots"], indexes=roots["indexes"])
  return last


def check_settings(section) -> None:
  """Checks config.realm before any work is done.

  Raises:
    UserError: a setting that there is not, or two that do not go together.
  """
  for name, got, known in (("sampling", section.sampling, SAMPLINGS), ("retriever_loss", section.retriever_loss, RETRIEVER_LOSSES)):
    if got not in known:
      raise artifacts.UserError(f"realm.{name} is {got!r}; use one of {', '.join(known)}.")
  if section.batch_candidates and not section.null_passage:
    raise artifacts.UserError(
        "realm.batch_candidates gives passages that were not read the likelihood of the null passage; set realm.null_passage to True.")
  if not 0 <= section.holders < section.num_candidates:
    raise artifacts.UserError(
        f"realm.holders is {section.holders}; it must be at least 0 and less than realm.num_candidates, {section.num_candidates}.")


def tell_start(model: RealmModel, batches: Batches, first: retrieval.IndexedRetriever) -> dict[str, float]:
  """Says on held-out clozes what REALM starts with, and warns if it has little to learn from.

  The retriever learns from the reader's likelihoods alone. So some candidates must hold the answer, and the reader must
  be able to tell them by it.

  Returns:
    answer_read: share of the clozes whose answer stands among the candidates as they are read at step 0; retrieval_utility, in
    nats. Nothing without held-out clozes.
  """
  queries = batches.sentences.held_out()
  if queries is None or not model.null:
    return {}
  section, rng = batches.config.realm, np.random.default_rng(31)
  size = section.batch_size
  rows = rng.permutation(len(queries.ids))[: max(size, _START_CLOZES // size * size)]
  with model.distribute_strategy.scope():
    model.compile()
  found, utilities = [], []
  for at in range(0, len(rows), size):
    part = batches.cropped(examples.rows_of(queries, rows[at : at + size]), rng)
    given = examples.draw_holders(part, section.holders, rng)
    batch = batches.with_candidates(part, indexed=first, given=given, rng=rng)
    found += list(examples.evidence(batch, tokenizer=batches.tokenizer))
    utilities.append((len(part.ids), model.test_on_batch(batch, return_dict=True)["retrieval_utility"]))
    model.reset_metrics()
  weights, values = zip(*utilities)
  said = {"answer_read": float(np.mean(found)), "retrieval_utility": float(np.average(values, weights=weights))}
  print(
      f"REALM starts: of {len(rows)} held-out clozes {said['answer_read']:.0%} have their answer among the candidates; retrieval "
      f"utility {said['retrieval_utility']:.2f} nats", flush=True)
  if said["answer_read"] < _ENOUGH_READ:
    print(
        f"WARNING: the retriever learns from candidates that hold the answer; {_ENOUGH_READ:.0%} is enough. Raise realm.holders or "
        "realm.num_candidates, or train the retriever for longer before (ict, recurring_spans).", file=sys.stderr, flush=True)
  if said["retrieval_utility"] < _ENOUGH_UTILITY:
    print(
        f"WARNING: the reader hardly uses what it reads; a utility of {_ENOUGH_UTILITY} nats is enough. Raise warmup.steps or "
        "warmup.holders.", file=sys.stderr, flush=True)
  return said


def check_warm_up(folder: str, retriever: Retriever, wanted: Retriever, init: str) -> None:
  got, weights = retriever.get_weights(), wanted.get_weights()
  if len(got) != len(weights) or not all(map(np.array_equal, got, weights)):
    raise artifacts.ArtifactError(
        f"{folder!r} was warmed up with another retriever than {init!r} holds now: this workdir's run started from that one. Give "
        "another workdir, or realm.init as it was.")


def check_corpus(config, table: passages.PassageTable) -> None:
  wanted = config.realm.num_candidates - config.realm.null_passage + config.realm.drop_own_passage
  if len(table) < wanted:
    raise artifacts.UserError(
        f"the corpus has {len(table)} passages, realm.num_candidates={config.realm.num_candidates} needs at least {wanted}: "
        "lower num_candidates or use a larger corpus.")


def recall_of(config, sentences: examples.MaskedSentences, tokenizer, matcher: metrics.AnswerMatcher) -> Callable[
    [retrieval.IndexedRetriever], dict]:
  """Measures a retriever on the held-out sentences, and on `config.dev_clozes`."""
  measures = held_out_recall(config, sentences, tokenizer), dev_cloze_recall(config, tokenizer, matcher)
  return lambda indexed: {name: value for measure in measures for name, value in measure(indexed).items()}


def held_out_recall(config, sentences: examples.MaskedSentences, tokenizer) -> Callable[[retrieval.IndexedRetriever], dict]:
  """Measures how often another passage that holds the masked span of a held-out sentence is among the first five of the corpus."""
  queries = sentences.held_out(with_holders=True)
  if queries is None:
    return lambda indexed: {}
  query_ids = examples.pack_queries(queries.ids.tensor(), tokenizer=tokenizer, length=config.retriever.query_length).numpy()

  def measure(indexed: retrieval.IndexedRetriever) -> dict[str, float]:
    num = min(5, indexed.num_rows)
    numbers = retrieval.candidates(indexed, query_ids, num=num, own_passages=queries.own_passages, null=False)
    return {HELD_OUT_RECALL: float(examples.contains(queries.holders, numbers).any(axis=1).mean())}

  return measure


def dev_cloze_recall(config, tokenizer, matcher: metrics.AnswerMatcher) -> Callable[[retrieval.IndexedRetriever], dict]:
  """Measures recall@5 on `config.dev_clozes` (none: an empty path)."""
  if not config.dev_clozes:
    return lambda indexed: {}
  clozes = questions.read_clozes(config.dev_clozes)
  masked = questions.masked_clozes(clozes, tokenizer=tokenizer, max_masks=config.reader.max_masks)
  query_ids = examples.pack_queries(masked.ids.tensor(), tokenizer=tokenizer, length=config.retriever.query_length).numpy()
  answers = [cloze.answers for cloze in clozes]

  def measure(indexed: retrieval.IndexedRetriever) -> dict[str, float]:
    depth = min(5, indexed.searcher.num_rows)
    scores = retrieval.recall(lambda part: indexed.search(query_ids[part], depth), answers, matcher, ks=[5])
    return {f"dev_cloze_{name}": value for name, value in scores.items()}

  return measure


if __name__ == "__main__":
  settings.start_trainer(pretrain, section="realm")

"""Runs the stages one after another, and measures results after each."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping

import jax
import keras
import numpy as np

from benchmarks.accelerator import batches, drawing, evaluation, training
from benchmarks.accelerator.packed import Packed
from benchmarks.accelerator.training import Index, Trainer
from realm_tf.models import devices, encoder
from realm_tf.models.in_batch import InBatchModel
from realm_tf.models.masked_reader import MaskedReader
from realm_tf.models.realm import RealmModel
from realm_tf.models.retriever import Retriever

PUBLISHED = "published"
# the stage that each stage starts from; if that one is skipped, the one before it
_FROM = {
  "ict": "start",
  "spans": "ict",
  "realm": "spans",
  "realm_stale": "spans",
  "realm_from_ict": "ict",
}


@dataclasses.dataclass
class Stage:
  """A stage of training.

  Attributes:
    steps: number of steps; 0 skips the stage.
    batch_size: clozes or passages per step.
    learning_rate: peak learning rate.
    secs: time limit, regardless of `steps`.
  """

  steps: int
  batch_size: int
  learning_rate: float
  secs: float = 60.0


@dataclasses.dataclass
class Sizes:
  """Sizes of a fresh encoder, of packed inputs and of REALM.

  Attributes:
    embed_chunk: passages embedded at once.
    ict_share: share of a batch of "spans": sentences that retrieve their own, intact passage.
    title_share: share of these sentences that begin with the title of the passage.
    query_words: minimum and maximum words of the queries of "spans"; if empty, whole sentences.
    keep_span: share of the masked sentences of "spans", and of REALM's queries to the retriever,
      that show the span.
    realm_query_words: the same for the reader's warm-up and REALM, around the mask.
    holders: candidates of REALM that are known to hold the masked span.
    anneal: share of REALM's steps over which retrieved ones replace them; 0: they stay.
    own_passages: share of REALM's clozes that keep their own passage, as one of the holders.
    pool: REALM's retrieved candidates are drawn from this many of the best; 0: take the best.
    with_holders: share of REALM's clozes that are drawn from the spans that have holders.
    retriever_rate: the retriever's learning rate in REALM, as a multiple of the reader's.
  """

  layers: int = 4
  hidden: int = 256
  projection: int = 128
  query_length: int = 64
  reader_length: int = 144
  max_masks: int = 8
  candidates: int = 4
  ict_share: float = 0.5
  title_share: float = 0.0
  query_words: tuple[int, ...] = (5, 16)
  keep_span: float = 0.5
  realm_query_words: tuple[int, ...] = (5, 16)
  holders: int = 1
  anneal: float = 0.0
  own_passages: float = 0.5
  pool: int = 1000
  with_holders: float = 0.75
  refresh_every: int = 100
  retriever_rate: float = 1.0
  embed_chunk: int = 2048


def plans() -> dict[str, dict[str, Stage]]:
  """Returns the stages of each start, which take eight minutes on an H100."""
  return {
    "scratch": {
      "ict": Stage(1000, 1024, 5e-4),
      "spans": Stage(1000, 1024, 5e-4),
      "warmup": Stage(3000, 512, 1e-3),
      "realm": Stage(300, 256, 3e-4),
      "realm_stale": Stage(300, 256, 3e-4),
      "realm_from_ict": Stage(300, 256, 3e-4),
    },
    PUBLISHED: {
      "ict": Stage(0, 512, 1e-5),
      "spans": Stage(100, 512, 2e-5),
      "warmup": Stage(500, 256, 3e-4),
      "realm": Stage(200, 64, 2e-5),
      "realm_stale": Stage(0, 64, 2e-5),
      "realm_from_ict": Stage(200, 64, 2e-5),
    },
  }


class Experiment:
  """Trains a retriever and a reader from one start, stage by stage.

  Args:
    start: "scratch" or "published".
    data: the packed data.
    sizes, stages: what to train.
    seed: seed of weights and batches.
    most_steps: limit of steps of any stage, for trials; schedules do not change.
    report: called with each row of results as soon as it is available.
  """

  def __init__(
    self,
    start: str,
    data: Packed,
    *,
    sizes: Sizes,
    stages: Mapping[str, Stage],
    seed: int,
    most_steps: int | None,
    report: Callable[[dict], None],
  ):
    self.start, self.data, self.sizes, self.stages, self.seed, self.report = (
      start,
      data,
      sizes,
      stages,
      seed,
      report,
    )
    self.most_steps = most_steps
    self._ranks: dict[str, np.ndarray] = {}  # by stage, see `evaluation.ranks`
    facts = data.facts
    self.layout = batches.Layout(
      query=sizes.query_length,
      passage=facts["length"],
      reader=sizes.reader_length,
      masks=sizes.max_masks,
      cls=facts["cls"],
      sep=facts["sep"],
      mask=facts["mask"],
    )
    self.corpus, self.questions = (
      batches.put(data, self.layout),
      batches.questions(data, self.layout),
    )
    keras.utils.set_random_seed(seed)
    # Building layers calls many small operations outside of jit, which compile faster on the CPU.
    with (
      jax.default_device(jax.local_devices(backend="cpu")[0]),
      devices.on(1, mixed_precision=True),
    ):
      self.retriever, self.reader = self._models()
    self.index = Index(
      self.retriever.query_tower,
      self.corpus,
      self.layout,
      chunk=min(sizes.embed_chunk, len(data.text_counts)),
    )

  def _models(self) -> tuple[Retriever, MaskedReader]:
    sizes, published = self.sizes, self.start == PUBLISHED
    architecture = (
      self.data.architecture | {"dropout": 0.0}
      if published
      else {
        "vocabulary_size": self.data.facts["vocabulary_size"],
        "num_layers": sizes.layers,
        "num_heads": max(1, sizes.hidden // 64),
        "hidden_dim": sizes.hidden,
        "intermediate_dim": 4 * sizes.hidden,
        "max_sequence_length": max(self.layout.passage, self.layout.reader),
        "dropout": 0.0,
      }
    )
    dim = architecture["hidden_dim"] if published else sizes.projection
    retriever = Retriever(
      architecture=architecture,
      projection_dim=dim,
      query_length=self.layout.query,
      passage_length=self.layout.passage,
      pooling="mean",
      segments=not published,  # sentence encoders are trained without them
      dropout=0.0,
      # f(x, z) starts as 20 times the cosine, as sentence encoders are trained.
      scale=(20 / dim) ** 0.5,
    )
    reader = MaskedReader(
      architecture=architecture,
      query_length=self.layout.query,
      length=self.layout.reader,
      max_masks=self.layout.masks,
      copies=True,
    )
    for bert in (retriever.query_tower.encoder, reader.encoder):
      if published:
        places = {weight.path: weight for weight in bert.weights}
        for path, value in self.data.encoder.items():
          places[path].assign(value)
      else:
        encoder.rescale_fresh(bert, 0.02)
    return retriever, reader

  # ------------------------------------------------------------------------------------ stages

  def run(self) -> None:
    """Runs all stages; those without steps are skipped."""
    self._measure("start", {})
    sizes = self.sizes
    self.in_batch("ict", drawing.ict)
    after_ict = self.retriever.get_weights()
    mixed = functools.partial(
      drawing.mixed_spans,
      query_words=sizes.query_words,
      keep_span=sizes.keep_span,
      ict_share=sizes.ict_share,
      title_share=sizes.title_share,
    )
    self.in_batch("spans", mixed)
    after_spans = self.retriever.get_weights()
    self.warmup()
    warm = self.reader.get_weights()
    for name, weights, refreshed in (
      ("realm", after_spans, True),
      ("realm_stale", after_spans, False),
      ("realm_from_ict", after_ict, True),
    ):
      if self.stages[name].steps:
        self.retriever.set_weights(weights)
        self.reader.set_weights(warm)
        self.realm(name, refreshed=refreshed)

  def in_batch(self, name: str, draw: Callable) -> None:
    """Trains with ICT, or with recurring spans mixed with short runs of words."""
    stage = self.stages[name]

    def batch(corpus, key, number, extra):
      return draw(corpus, key, stage.batch_size, self.layout), {}

    architecture = self._architecture()
    forward = sum(
      training.encoder_operations(architecture, stage.batch_size, length)
      for length in (self.layout.query, self.layout.passage)
    )
    self._train(name, InBatchModel(self.retriever), batch, operations=3 * forward)

  def warmup(self) -> None:
    """Trains the reader alone."""
    stage, model, layout = self.stages["warmup"], RealmModel(None, self.reader), self.layout

    def batch(corpus, key, number, extra):
      words = self.sizes.realm_query_words
      return drawing.warmup(corpus, key, stage.batch_size, layout, query_words=words), {}

    self._train(
      "warmup",
      model,
      batch,
      operations=3 * self._reading(stage.batch_size),
      recall=False,
    )

  def realm(self, name: str, *, refreshed: bool) -> None:
    """Trains REALM; p(z|x) is over the candidates of the whole batch.

    Args:
      name: name of the stage.
      refreshed: whether the passages are embedded again every `sizes.refresh_every` steps. The
        alternative is the paper's ablation with a stale index (Table 2).
    """
    stage, sizes, layout = self.stages[name], self.sizes, self.layout
    tower = self.retriever.query_tower
    model = RealmModel(self.retriever, self.reader, batch_candidates=True)
    batch = training.realm_batch(
      tower,
      layout,
      batch_size=stage.batch_size,
      candidates=sizes.candidates,
      holders=sizes.holders,
      anneal=sizes.anneal,
      own_passages=sizes.own_passages,
      pool=sizes.pool,
      with_holders=sizes.with_holders,
      query_words=sizes.realm_query_words,
      keep_span=sizes.keep_span,
      steps=stage.steps,
    )
    number_of = {id(variable): at for at, variable in enumerate(model.trainable_variables)}
    places = [number_of[id(variable)] for variable in tower.trainable_variables]

    def refresh(trainable):
      return self.index.snapshot([trainable[at] for at in places])

    architecture, rows = self._architecture(), stage.batch_size * sizes.candidates
    queries = training.encoder_operations(architecture, stage.batch_size, layout.query)
    search = 2 * stage.batch_size * len(self.data.text_counts) * tower.projection.units
    passages = training.encoder_operations(architecture, rows, layout.passage)
    operations = 3 * (self._reading(rows) + passages + queries) + queries + search
    self._train(
      name,
      model,
      batch,
      operations=operations,
      extra=self.index.snapshot(),
      every=sizes.refresh_every,
      refresh=refresh if refreshed else None,
      slow=self.retriever.trainable_variables,
      slow_factor=sizes.retriever_rate,
    )

  def _train(
    self,
    name: str,
    model: InBatchModel | RealmModel,
    batch: Callable,
    *,
    operations: float,
    recall: bool = True,
    extra=None,
    every: int = 0,
    refresh: Callable | None = None,
    **rates,
  ) -> None:
    stage = self.stages[name]
    if not stage.steps:
      return
    trainer = Trainer(
      model,
      batch,
      corpus=self.corpus,
      steps=stage.steps,
      learning_rate=stage.learning_rate,
      **rates,
    )
    trained = trainer.run(
      min(stage.steps, self.most_steps or stage.steps),
      seed=self.seed,
      extra=extra,
      secs=stage.secs,
      every=every,
      refresh=refresh,
    )
    rate, peak = trained.steps_per_sec, training.peak_operations()
    row = {
      "batch_size": stage.batch_size,
      "learning_rate": stage.learning_rate,
      "steps": trained.steps,
      "planned_steps": stage.steps,
      "compile_secs": round(trained.compile_secs, 1),
      "secs": round(trained.secs, 1),
      "examples_per_sec": round(rate * stage.batch_size, 1),
      "teraflops": round(rate * operations / 1e12, 2),
      "share_of_peak": peak and round(rate * operations / peak, 4),
      "metrics": trained.metrics,
    }
    self._measure(name, row, recall=recall)

  def _reading(self, rows: int) -> float:
    architecture = self._architecture()
    return training.encoder_operations(
      architecture, rows, self.layout.reader
    ) + training.head_operations(architecture, rows, self.layout.masks)

  def _architecture(self) -> Mapping:
    return self.reader.get_config()["architecture"]

  # ------------------------------------------------------------------------------------- evaluation

  def _measure(self, name: str, row: dict, *, recall: bool = True) -> None:
    """Reports a row, with zero-shot recall if the retriever has changed."""
    if recall:
      started = time.monotonic()
      snapshot = jax.block_until_ready(self.index.snapshot())
      row["embed_secs"] = round(time.monotonic() - started, 2)
      found = self.index.search(snapshot, self.questions)
      row["recall"] = evaluation.score(self.data, found)
      self._ranks[name] = evaluation.ranks(self.data, found)[0]
      row["ranks"] = self._ranks[name].tolist()
      if name in _FROM:
        base = _FROM[name]
        while base not in self._ranks:
          base = _FROM[base]
        row["from"] = base
        row["gains"] = evaluation.gains(self.data, self._ranks[name], self._ranks[base])
    self.report(
      {"start": self.start, "stage": name, **row, "peak_memory_gb": training.peak_memory_gb()}
    )

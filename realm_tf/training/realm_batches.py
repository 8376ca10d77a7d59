"""Training batches of REALM and of the masked-LM stages before it (REALM, section 3.4)."""

import dataclasses
import sys

import numpy as np

from realm_tf import errors
from realm_tf.corpus import passages
from realm_tf.corpus.candidates import NULL_PASSAGE
from realm_tf.corpus.tokenization import Tokenizer
from realm_tf.examples import packing
from realm_tf.examples.masked_sentences import MaskedSentences
from realm_tf.examples.masking import MaskedQueries, crop_queries, draw_holders, for_retriever
from realm_tf.examples.realm import evidence, realm_batch, unread_passages
from realm_tf.retrieval import dense
from realm_tf.storage import paths

SAMPLINGS = ("sentences", "passages")  # units that an epoch visits once each
_NUM_HELD_OUT = 1000  # sentences


@dataclasses.dataclass(frozen=True)
class Lengths:
  """Lengths of packed inputs in word pieces, including [CLS] and [SEP].

  Attributes:
    query_length, passage_length, reader_length: lengths of the inputs of query tower, passage tower
      and reader.
    title_length: most word pieces read of a passage's title; None means half of the passage.
    max_masks: most word pieces masked in a query.
  """

  query_length: int
  passage_length: int
  title_length: int | None
  reader_length: int
  max_masks: int


@dataclasses.dataclass(frozen=True)
class RealmSettings:
  """Settings for the queries and candidates of REALM's batches.

  Attributes:
    steps: steps of the whole training.
    batch_size: queries in a batch, B.
    sampling: units that an epoch visits once each, one of SAMPLINGS.
    query_words: fewest and most words of a query, a random window around the mask; empty means the
      whole sentence.
    keep_span: share of the queries that show the span to the retriever.
    title_share: share of the queries that begin, for the retriever, with the title of their own
      passage, if it is known.
    with_holders: share of each batch whose masked span also occurs in other passages.
    num_candidates: candidates of each query, including the null passage, C.
    null_passage: whether the null passage is a candidate.
    drop_own_passage: whether the query's own passage is excluded from the candidates.
    own_passages: share of each batch that keeps its own passage nevertheless.
    holders: initial number of candidates that are known to hold the masked span.
    anneal: share of the steps over which retrieved candidates replace holders; 0 keeps the holders.
    pool: number of best passages from which the retrieved candidates are drawn; 0 takes the best.
    batch_candidates: whether p(z|x) is over the candidates of the whole batch.
    needs_evidence: whether the retriever learns only from queries with the answer in a candidate.
  """

  steps: int
  batch_size: int
  sampling: str
  query_words: tuple[int, ...]
  keep_span: float
  title_share: float
  with_holders: float
  num_candidates: int
  null_passage: bool
  drop_own_passage: bool
  own_passages: float
  holders: int
  anneal: float
  pool: int
  batch_candidates: bool
  needs_evidence: bool

  def check(self) -> None:
    """Checks that the settings are valid and compatible.

    Raises:
      UserError: they are not.
    """
    if self.sampling not in SAMPLINGS:
      raise errors.UserError(
        f"realm.sampling is {self.sampling!r}; use one of {', '.join(SAMPLINGS)}."
      )
    if not 0 <= self.holders < self.num_candidates:
      raise errors.UserError(
        f"realm.holders is {self.holders}; it must be at least 0 and less than "
        f"realm.num_candidates, {self.num_candidates}."
      )

  def check_corpus(self, table: passages.PassageTable) -> None:
    """Checks that the corpus has enough passages.

    Raises:
      UserError: it has fewer passages than a query needs candidates.
    """
    wanted = self.num_candidates - self.null_passage + self.drop_own_passage
    if table.num_alive < wanted:
      raise errors.UserError(
        f"the corpus has {table.num_alive} passages, realm.num_candidates={self.num_candidates} "
        f"needs at least {wanted}: lower num_candidates or use a larger corpus."
      )


@dataclasses.dataclass(frozen=True)
class BatchSettings:
  """Settings of `Batches`.

  Attributes:
    spans: folder with sentences of X, the pre-training corpus.
    knowledge_spans: folder with sentences of Z, the knowledge corpus.
    masking: what is masked, see `MaskedSentences`.
    lengths: lengths of packed inputs.
    realm: queries and candidates of REALM's batches.
    seed: seed of all random draws.
  """

  spans: str
  knowledge_spans: str
  masking: str
  lengths: Lengths
  realm: RealmSettings
  seed: int


def masked_sentences(
  folder: str,
  table: passages.PassageTable,
  *,
  tokenizer: Tokenizer,
  lengths: Lengths,
  masking: str,
) -> MaskedSentences:
  """Reads the sentences of a spans folder, masked according to `masking`.

  About 1,000 sentences are held out, the same for every trainer.
  """
  return MaskedSentences(
    folder,
    tokenizer=tokenizer,
    query_length=lengths.query_length,
    max_masks=lengths.max_masks,
    knowledge=table,
    masking=masking,
    num_held_out=_NUM_HELD_OUT,
  )


class Batches:
  """Makes the batch of each training step for the masked-LM stages and REALM.

  Args:
    settings: settings of sentences, queries and candidates.
    table: the knowledge corpus. Indexes may be of a later version of it, which has new passages.
    tokenizer: tokenizer of the corpus.
  """

  def __init__(self, settings: BatchSettings, table: passages.PassageTable, tokenizer: Tokenizer):
    self.settings, self.table, self.tokenizer = settings, table, tokenizer
    self.sentences = self._read(settings.spans)
    same = paths.resolve(settings.spans) == paths.resolve(settings.knowledge_spans)  # X is Z
    self.knowledge_sentences = self.sentences if same else self._read(settings.knowledge_spans)
    asked = settings.realm.holders or settings.realm.with_holders
    if asked and settings.masking == "salient" and not self.sentences.num_with_holders:
      print(
        f"WARNING: no span of {settings.spans!r} occurs in few enough other passages: REALM "
        "continues without holders.",
        file=sys.stderr,
        flush=True,
      )

  def _read(self, folder: str) -> MaskedSentences:
    return masked_sentences(
      folder,
      self.table,
      tokenizer=self.tokenizer,
      lengths=self.settings.lengths,
      masking=self.settings.masking,
    )

  def masked_lm(
    self,
    step: int,
    *,
    batch_size: int,
    pretraining_every: int,
    holders: float = 0.0,
    indexed: dense.IndexedRetriever | None = None,
  ) -> dict[str, np.ndarray]:
    """Makes a batch of the masked-LM stages, with one passage for each query.

    In these stages the reader learns to copy from a passage.

    Most steps have masked sentences of the knowledge corpus with their own, intact passages. Every
    `pretraining_every` steps there are masked sentences of the pre-training corpus with the best
    passage of `indexed`, or with the null passage if it is None.

    Args:
      step: training step.
      batch_size: queries in the batch.
      pretraining_every: steps from one batch of the pre-training corpus to the next.
      holders: share of each batch that is read with another passage that holds the masked span
        instead.
      indexed: finds passages for sentences of the pre-training corpus, or None.
    """
    own = step % pretraining_every != pretraining_every - 1
    source, seed = self.knowledge_sentences if own else self.sentences, self.settings.seed + 1
    rng = np.random.default_rng([seed, 23, step])
    queries = self.cropped(
      source.batch(step, batch_size=batch_size, seed=seed, with_holders=holders), rng
    )
    query_ids = self.pack_queries(queries)
    if own:
      numbers = queries.own_passages[:, :1]
    elif indexed is None:
      numbers = np.full([batch_size, 1], NULL_PASSAGE)
    else:
      numbers = dense.candidates(
        indexed, query_ids, num=1, own_passages=queries.own_passages, null=False
      )
    num_held = round(holders * batch_size)
    drawn = draw_holders(queries, 1, rng)
    numbers = np.concatenate([drawn[:num_held], numbers[num_held:]])
    return self._pack(queries, query_ids, numbers, indexed.table if indexed else self.table)

  def realm(self, step: int, *, indexed: dense.IndexedRetriever) -> dict[str, np.ndarray]:
    """Makes REALM's batch of a step, masked sentences of the pre-training corpus and candidates."""
    section, seed = self.settings.realm, self.settings.seed + 2
    queries = self.sentences.batch(
      step,
      batch_size=section.batch_size,
      seed=seed,
      by_passage=section.sampling == "passages",
      with_holders=section.with_holders,
    )
    rng = np.random.default_rng([seed, 29, step])
    queries = self.cropped(queries, rng)
    return self.with_candidates(
      queries,
      step,
      indexed=indexed,
      rng=rng,
      keep_span=section.keep_span,
      title_share=section.title_share,
    )

  def with_candidates(
    self,
    queries: MaskedQueries,
    step: int,
    *,
    indexed: dense.IndexedRetriever,
    rng: np.random.Generator,
    keep_span: float = 0.0,
    title_share: float = 0.0,
  ) -> dict[str, np.ndarray]:
    """Makes REALM's batch of a training step from masked queries.

    At first, `realm.holders` of the candidates are given: passages that are known to hold the
    masked span. Each is replaced by a retrieved one with a probability that grows from 0 to 1 over
    the first `realm.anneal` of the training; if `realm.anneal` is 0, they are kept. The last
    `realm.own_passages` of the queries keep their own passage as one of the given candidates,
    regardless of `realm.drop_own_passage`.

    Args:
      queries: the masked sentences.
      step: training step.
      indexed: finds the candidates that are not given.
      rng: random generator of all draws.
      keep_span: share of the queries that show the span to the retriever.
      title_share: share of the queries that show the retriever the title of their own passage.
    """
    section, num = self.settings.realm, len(queries.ids)
    keeps_own = np.arange(num) >= num - round(section.own_passages * num)
    given = draw_holders(queries, section.holders, rng)
    if section.holders:
      given[keeps_own, 0] = queries.own_passages[keeps_own, 0]
    share = max(0.0, 1 - step / (section.anneal * max(section.steps, 1))) if section.anneal else 1.0
    given = np.where(rng.random(given.shape) < share, given, NULL_PASSAGE)
    lengths = self.settings.lengths
    shown = for_retriever(
      queries,
      rng,
      keep_span=keep_span,
      title_share=title_share,
      table=self.table,
      query_length=lengths.query_length,
      passage_length=lengths.passage_length,
      title_length=lengths.title_length,
    )
    query_ids = self.pack_queries(shown)
    dropped = np.where(keeps_own[:, None], NULL_PASSAGE, queries.own_passages)
    numbers = dense.candidates(
      indexed,
      query_ids,
      num=section.num_candidates,
      null=section.null_passage,
      given=given,
      own_passages=dropped if section.drop_own_passage else None,
      pool=section.pool,
      rng=rng,
    )
    batch = self._pack(queries, query_ids, numbers, indexed.table)
    if section.batch_candidates:
      batch["unread"] = unread_passages(queries, numbers)
    if section.needs_evidence:
      batch["evidence"] = evidence(batch, tokenizer=self.tokenizer)
    return batch

  def cropped(self, queries: MaskedQueries, rng: np.random.Generator) -> MaskedQueries:
    """Crops masked sentences to `realm.query_words`."""
    words = self.settings.realm.query_words
    return crop_queries(queries, words, tokenizer=self.tokenizer, rng=rng) if words else queries

  def pack_queries(self, queries: MaskedQueries) -> np.ndarray:
    """Packs queries as inputs of the query tower, [B, Lq] int32."""
    return packing.pack_queries(
      queries.ids.tensor(), tokenizer=self.tokenizer, length=self.settings.lengths.query_length
    ).numpy()

  def _pack(self, queries, query_ids, numbers, table):
    lengths = self.settings.lengths
    return realm_batch(
      queries,
      query_ids,
      numbers,
      table,
      tokenizer=self.tokenizer,
      query_length=lengths.query_length,
      passage_length=lengths.passage_length,
      reader_length=lengths.reader_length,
      title_length=lengths.title_length,
    )

"""Inputs and weights that all sides of a comparison share.

A job's folder holds inputs.npz, weights.npz and a snapshot of the same weights.
"""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import keras
import numpy as np

from benchmarks.speed import jobs
from realm_tf.checkpoints import published_names
from realm_tf.corpus import passages, vocabularies
from realm_tf.corpus.candidates import NULL_PASSAGE
from realm_tf.corpus.passages import PassageTable
from realm_tf.corpus.tokenization import Tokenizer
from realm_tf.examples import masking, packing, sentences
from realm_tf.examples.realm import realm_batch
from realm_tf.models import snapshots
from realm_tf.models.masked_reader import MaskedReader
from realm_tf.models.retriever import Retriever
from realm_tf.storage.columns import Chunk, Ragged, splits_of

QUERY_LENGTH, PASSAGE_LENGTH, READER_LENGTH = 32, 128, 160  # word pieces
CANDIDATES, MAX_MASKS, USED_MASKS = 8, 10, 4  # the last: most word pieces masked in a query
PROJECTION = 128
NUM_BATCHES = 8  # different batches, used in turn
VOCABULARY_SIZE = 30_522  # of drawn passages: BERT's
PARTS = ("title", "text")
FULL, REAL = LENGTHS = ("full", "real")

_SPREAD = 0.02  # standard deviation of the noise on every vector
# Deciles of the lengths, in word pieces, of 46,523 Wikipedia passages made with --max_tokens=128.
# Drawn lengths are uniform between them.
_DECILES = {
  "title": (1, 2, 3, 3, 4, 5, 5, 6, 7, 8, 24),
  "text": (2, 40, 65, 82, 92, 99, 104, 109, 113, 117, 124),
  "sentence": (1, 7, 14, 18, 22, 26, 31, 36, 43, 56, 123),
}


class Corpus(NamedTuple):
  """Passages and queries.

  Attributes:
    tokenizer: the vocabulary.
    table: N passages; drawn ones have word pieces only.
    queries: sentences to mask.
    null: whether the first candidate of a query is the null passage, as in training.
  """

  tokenizer: Tokenizer
  table: PassageTable
  queries: Ragged
  null: bool


def read(folder: str, *, num_passages: int, seed: int) -> Corpus:
  """Draws passages of a passages folder, and a sentence of each as a query."""
  table, rng = passages.load(folder), np.random.default_rng(seed)
  numbers = rng.permutation(len(table))[:num_passages]

  def drawn(rows: Ragged) -> Ragged:
    return Ragged.of([rows[number] for number in numbers], np.int32)

  text_ids = drawn(table.text_ids)
  queries = sentences.draw_sentences(
    text_ids, drawn(table.token_starts), drawn(table.sentence_starts), share=1, rng=rng
  )
  chosen = _table(drawn(table.title_ids), text_ids)
  return Corpus(passages.load_tokenizer(folder), chosen, queries, null=True)


def draw(lengths: str, scratch: str, *, num_passages: int, seed: int) -> Corpus:
  """Draws passages and queries of random word pieces.

  Args:
    lengths: "real" for the lengths of Wikipedia passages and their sentences; "full" for rows
      without any padding.
    scratch: an empty folder for the vocabulary.
    num_passages: N.
    seed: seed of everything drawn.
  """
  special = vocabularies.SPECIAL
  words = [f"word{number}" for number in range(VOCABULARY_SIZE - len(special))]
  vocabularies.write(scratch, [*special, *words])
  rng = np.random.default_rng(seed)

  def rows(kind: str) -> Ragged:
    position = 10 * rng.random(num_passages)
    sizes = np.interp(position, np.arange(11), _DECILES[kind]).astype(int)
    if lengths == FULL and kind != "title":
      sizes[:] = READER_LENGTH  # more than there is room for
    values = rng.integers(len(special), VOCABULARY_SIZE, sizes.sum(), dtype=np.int32)
    return Ragged([Chunk(values, splits_of(sizes))])

  table = _table(rows("title"), rows("text"))
  return Corpus(Tokenizer(scratch), table, rows("sentence"), null=lengths == REAL)


def _table(title_ids: Ragged, text_ids: Ragged) -> PassageTable:
  """Returns passages that have word pieces only."""
  unknown = [""] * len(text_ids)
  nothing = Ragged.of([[]] * len(text_ids), np.int32)
  return PassageTable(
    unknown, unknown, title_ids, text_ids, nothing, nothing, nothing, nothing, folder=""
  )


def realm_batches(corpus: Corpus, batch_size: int, *, seed: int) -> dict[str, np.ndarray]:
  """Makes NUM_BATCHES batches of masked sentences with random candidates.

  A run of 1 to USED_MASKS word pieces of each sentence is masked.

  Returns:
    The arrays of `realm_batch`, each [NUM_BATCHES, batch_size, ...].
  """
  rng, batches = np.random.default_rng(seed), []
  for _ in range(NUM_BATCHES):
    chosen = rng.integers(len(corpus.queries), size=batch_size)
    room = packing.query_room(QUERY_LENGTH)
    ids = [corpus.queries[row][:room] for row in chosen]
    at = []
    for pieces in ids:
      size = min(int(rng.integers(1, USED_MASKS, endpoint=True)), len(pieces))
      at.append(rng.integers(len(pieces) - size, endpoint=True) + np.arange(size))
    queries = masking.mask_pieces(
      ids, at, np.zeros(batch_size, int), tokenizer=corpus.tokenizer, max_masks=MAX_MASKS
    )
    numbers = rng.integers(len(corpus.table), size=(batch_size, CANDIDATES))
    if corpus.null:
      numbers[:, 0] = NULL_PASSAGE
    query_ids = packing.pack_queries(
      queries.ids.tensor(), tokenizer=corpus.tokenizer, length=QUERY_LENGTH
    ).numpy()
    lengths = {"query_length": QUERY_LENGTH, "passage_length": PASSAGE_LENGTH}
    lengths["reader_length"] = READER_LENGTH
    tokenizer = corpus.tokenizer
    batches.append(
      realm_batch(queries, query_ids, numbers, corpus.table, tokenizer=tokenizer, **lengths)
    )
  return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}


def packed_passages(corpus: Corpus) -> dict[str, np.ndarray]:
  """Returns the passages as ragged word pieces, and packed as token_ids, segment_ids [N, L]."""
  ragged = {"title": corpus.table.title_ids, "text": corpus.table.text_ids}
  packed = packing.pack_passages(
    *(ragged[part].tensor() for part in PARTS), tokenizer=corpus.tokenizer, length=PASSAGE_LENGTH
  )
  return {
    **{f"{part}_ids": rows.values for part, rows in ragged.items()},
    **{f"{part}_splits": rows.splits for part, rows in ragged.items()},
    "token_ids": packed.token_ids.numpy(),
    "segment_ids": packed.segment_ids.numpy(),
  }


def architecture_of(layers: int, hidden: int, vocabulary_size: int) -> dict:
  """Returns an encoder's sizes: heads of 64 dimensions, no dropout."""
  return {
    "vocabulary_size": vocabulary_size,
    "num_layers": layers,
    "num_heads": max(hidden // 64, 1),
    "hidden_dim": hidden,
    "intermediate_dim": 4 * hidden,
    "max_sequence_length": 512,
    "dropout": 0.0,
  }


def write(job: jobs.Job, corpus: Corpus, *, batch_size: int, seed: int) -> dict[str, np.ndarray]:
  """Writes a job's inputs and weights; returns the inputs.

  Every weight is drawn, biases too, so that a transposed or a swapped one shows.
  """
  arrays = (
    realm_batches(corpus, batch_size, seed=seed)
    if job.work == jobs.REALM_STEP
    else packed_passages(corpus)
  )
  _save(job.inputs, arrays)
  keras.utils.set_random_seed(seed)
  retriever = Retriever(
    architecture=job.architecture,
    projection_dim=PROJECTION,
    query_length=QUERY_LENGTH,
    passage_length=PASSAGE_LENGTH,
    dropout=0,
  )
  models: dict[str, keras.Model] = {"retriever": retriever}
  slots = published_names.embedder_slots(retriever.query_tower, "retriever.")
  if job.work == jobs.REALM_STEP:
    models["reader"] = reader = MaskedReader(
      architecture=job.architecture,
      query_length=QUERY_LENGTH,
      length=READER_LENGTH,
      max_masks=MAX_MASKS,
    )
    named = published_names.masked_reader_slots(reader)
    slots |= {f"reader.{name}": slot for name, slot in named.items()}
  rng = np.random.default_rng(seed)
  for slot in slots.values():
    if len(slot.shape) == 1:
      slot.put(slot.get() + rng.normal(0, _SPREAD, slot.shape).astype(np.float32))
  _save(job.weights, {name: slot.get() for name, slot in slots.items()})
  snapshots.publish(
    os.path.dirname(snapshot_of(job.folder)),
    0,
    models,
    tokenizer=corpus.tokenizer,
    made_by="benchmarks.speed",
  )
  return arrays


def _save(path: str, arrays: Mapping[str, Any]) -> None:
  np.savez(path, **arrays)


def snapshot_of(folder: str) -> str:
  """Returns the path of the snapshot in a job's folder."""
  return os.path.join(folder, "snapshots", "00000000")

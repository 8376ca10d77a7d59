"""Artifact folders that tests make without the jobs: passages, snapshots, indexes and others."""

import dataclasses
import os

import keras
import numpy as np

from beam_jobs import embed_passages, refresh_index
from realm_tf.corpus import passages
from realm_tf.corpus.tokenization import Tokenizer
from realm_tf.corpus.vocabularies import SPECIAL
from realm_tf.models import snapshots
from realm_tf.models.retriever import Retriever
from realm_tf.retrieval import index
from realm_tf.retrieval.index_config import IndexConfig
from realm_tf.storage import artifacts, publishing
from realm_tf.training import refresh

WORDS = [f"w{i}" for i in range(50)]
PASSAGE_LENGTH = 40  # not a multiple of the length step


def make(folder, *, kind="things", text="x", inputs=None, **config) -> dict:
  with publishing.publish(str(folder), kind=kind, config=config, inputs=inputs or {}) as staged:
    artifacts.write_text(os.path.join(staged.path, "data.txt"), text)
    staged.counts, staged.content = {"rows": 1}, text
  return artifacts.read_info(str(folder))


def make_passages(
  folder: str, *, num_passages: int = 90, num_shards: int = 3, seed: int = 0
) -> str:
  """Writes a passages folder of random words; some passages are empty and some too long."""
  rng = np.random.default_rng(seed)
  with publishing.publish(folder, kind=passages.KIND, config={}, inputs={}, seed=seed) as staged:
    artifacts.write_text(
      os.path.join(staged.path, "vocab.txt"), "\n".join([*SPECIAL, *WORDS]) + "\n"
    )
    tokenizer = Tokenizer(staged.path)
    texts = [
      " ".join(rng.choice(WORDS, rng.integers(0, 2 * PASSAGE_LENGTH))) for _ in range(num_passages)
    ]
    rows = passages.make_passages(
      tokenizer, [(rng.choice(WORDS), [text]) for text in texts], range(num_passages)
    )
    for shard, numbers in enumerate(np.array_split(np.arange(num_passages), num_shards)):
      path = os.path.join(staged.path, passages.shard_name("passages", shard, num_shards))
      passages.write_shard(path, [rows[number] for number in numbers], passages.Passage)
    staged.counts = {"passages": num_passages}
    staged.details = {
      "vocab_fingerprint": tokenizer.fingerprint,
      "vocab_size": tokenizer.size,
      "lower_case": True,
    }
  return folder


def publish_snapshot(root: str, step: int, *, vocab: str) -> str:
  """Writes a snapshot of a retriever with fresh weights."""
  tokenizer = Tokenizer(vocab)
  keras.utils.set_random_seed(step)
  retriever = Retriever(
    architecture=dict(
      vocabulary_size=tokenizer.size,
      num_layers=1,
      num_heads=2,
      hidden_dim=16,
      intermediate_dim=32,
      max_sequence_length=PASSAGE_LENGTH,
      dropout=0.1,
    ),
    projection_dim=8,
    query_length=16,
    passage_length=PASSAGE_LENGTH,
  )
  return snapshots.publish(
    root, step, {"retriever": retriever}, tokenizer=tokenizer, made_by="test"
  )


def publish_index(folder, rows, *, config=None, num_shards=3, passages=None, snapshot=None):
  """Writes an index folder without the jobs."""
  config = config or IndexConfig()
  inputs = {name: path for name, path in (("passages", passages), ("snapshot", snapshot)) if path}
  with publishing.publish(
    folder, kind=index.KIND, config=dataclasses.asdict(config), inputs=inputs
  ) as staged:
    for i, part in enumerate(np.array_split(rows, num_shards)):
      path = os.path.join(staged.path, index.shard_name(i, num_shards))
      index.write_shard(path, part, embedding_type=config.embedding_type)
    staged.details = index.build(staged.path, config, num_rows=len(rows))
    staged.counts = {"passages": len(rows)}
  return folder


def make_index(job: refresh.RefreshJob, workdir: str) -> None:
  """Does what `refresh.make_index` does, without the seconds that starting a process takes."""
  refresh_index.refresh_newest(
    snapshots=os.path.join(workdir, "snapshots"),
    passages=job.passages,
    indexes=os.path.join(workdir, "indexes"),
    config=IndexConfig(),
    keep=2,
    embed=lambda folder, **what: embed_passages.embed(folder, **what, jit_compile=False),
  )


def embeddings_of(folder: str) -> np.ndarray:
  return index.read_embeddings(folder, num_rows=artifacts.read_info(folder)["counts"]["passages"])

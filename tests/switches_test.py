"""Settings of the trainers change what they should, and nothing else.

Tests the choice of candidates, XLA, and bfloat16.
"""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest

from realm_tf import finetune, pretrain, pretrain_ict, progress, settings
from realm_tf.corpus import candidates, passages
from realm_tf.corpus.candidates import NULL_PASSAGE
from realm_tf.examples import packing
from realm_tf.examples.masked_sentences import MaskedSentences
from realm_tf.models import snapshots
from realm_tf.retrieval import index
from realm_tf.storage import artifacts
from realm_tf.training import loop, realm_batches, refresh
from tests.conftest import eagerly
from tests.processes import REPOSITORY

# --------------------------------------------------------------------------------------- candidates


def trained_on(toy, workdir: str, **values) -> list[dict[str, np.ndarray]]:
  """Returns the batches of four steps of `pretrain` on X = Z.

  The toy's untrained index stays.
  """
  seen, train = [], loop.train

  def recorded(model, batches, **what):
    train(model, lambda step: seen.append(batches(step)) or seen[-1], **what)

  config = toy.config(
    spans=toy.config().knowledge_spans,
    dev_clozes="",
    warmup__steps=0,
    realm__steps=4,
    refresh__start_job=False,
    **values,
  )
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "train", recorded)
    # the first exists, and the last is not used
    patch.setattr(refresh, "make_index", lambda job, workdir: None)
    with eagerly():
      pretrain.pretrain(config, workdir)
  return seen


class Corpus:
  """Returns the toy's passages as a batch has them."""

  def __init__(self, toy):
    config = toy.config()
    self.table = passages.load(config.passages)
    self.tokenizer = passages.load_tokenizer(config.passages)
    numbers = np.arange(NULL_PASSAGE, len(self.table))
    packed = packing.pack_passages(
      *packing.gather_passages(self.table, numbers),
      tokenizer=self.tokenizer,
      length=config.retriever.passage_length,
    )
    self._numbers = {
      ids.tobytes(): number for ids, number in zip(packed.token_ids.numpy(), numbers, strict=True)
    }
    assert len(self._numbers) == len(numbers)

  def candidates(self, batch: dict[str, np.ndarray]) -> np.ndarray:
    """[B, C] passage numbers."""
    return np.array([[self._numbers[ids.tobytes()] for ids in row] for row in batch["passage_ids"]])

  def own(self, batch: dict[str, np.ndarray]) -> np.ndarray:
    """[B] the passage that each query is a sentence of, found by its words."""
    found = []

    def as_words(ids):
      return f" {' '.join(map(str, ids))} "

    for ids, positions, targets, mask in zip(
      batch["query_ids"],
      batch["mask_positions"],
      batch["targets"],
      batch["target_mask"],
      strict=True,
    ):
      ids = ids.copy()
      ids[positions[mask > 0]] = targets[mask > 0]
      sentence = as_words(ids[1 : list(ids).index(self.tokenizer.sep_id)])
      (number,) = (
        number
        for number in range(len(self.table))
        if sentence in as_words(self.table.text_ids[number])
      )
      found.append(number)
    return np.array(found)


@pytest.mark.parametrize("drop, null", [(False, True), (True, False)])
def test_own_passage_and_null_passage(toy, tmp_path, drop, null):
  batches = trained_on(
    toy,
    str(tmp_path),
    realm__num_candidates=9,
    realm__drop_own_passage=drop,
    realm__null_passage=null,
  )
  corpus, retriever = Corpus(toy), snapshots.load_retriever(toy.path("ict/snapshots/00000000"))
  vectors = index.read_embeddings(toy.path("ict/indexes/00000000"), num_rows=32).astype(np.float64)
  got = np.concatenate([corpus.candidates(batch) for batch in batches])  # [16, 9]
  own = np.concatenate([corpus.own(batch) for batch in batches])  # [16]
  scores = np.concatenate(
    [
      np.array(retriever.embed_queries(batch["query_ids"]), np.float64) @ vectors.T
      for batch in batches
    ]
  )
  share = (got == own[:, None]).any(axis=1).mean()
  assert share == 0 if drop else share > 0.2, share
  assert ((got == NULL_PASSAGE).sum(axis=1) == null).all(), got
  if null:
    assert (got[:, 0] == NULL_PASSAGE).all(), got
  if drop:
    scores[np.arange(16), own] = -np.inf
  np.testing.assert_array_equal(got[:, int(null) :], np.argsort(-scores, axis=1)[:, : 9 - null])
  rows = progress.read_metrics(str(tmp_path))
  assert [row["step"] for row in rows] == [2, 4] and all(np.isfinite(row["loss"]) for row in rows)
  assert (rows[-1]["null_prior"] > 0) == null  # no measure of a null passage that is not there


# ----------------------------------------------------------------------------------------- sampling


class Found:
  """A stand-in for an index that finds the first passages for every query."""

  num_rows = 32

  def __init__(self, table: passages.PassageTable):
    self.table = table

  def search(self, query_ids: np.ndarray, num: int) -> candidates.Found:
    numbers = np.tile(np.arange(num, dtype=np.int32), (len(query_ids), 1))
    return candidates.Found(numbers, np.zeros(numbers.shape, np.float32))


def test_sampling_by_passage_trains_on_every_passage_once_an_epoch(toy):
  """As in the released code; by sentence, passages of many sentences are more frequent."""
  own, corpus = {}, Corpus(toy)
  for sampling in ("passages", "sentences"):
    config = toy.config(
      spans=toy.config().knowledge_spans, realm__sampling=sampling, realm__batch_size=8
    )
    batches = realm_batches.Batches(settings.batches(config), corpus.table, corpus.tokenizer)
    own[sampling] = np.concatenate(
      [corpus.own(batches.realm(step, indexed=Found(corpus.table))) for step in range(4)]
    )
  trained = set(range(32)) - set(batches.sentences.held_out().own_passages[:, 0])
  assert sorted(own["passages"][: len(trained)]) == sorted(trained), (
    "an epoch of four batches of eight"
  )
  assert len(set(own["sentences"])) < len(trained), sorted(own["sentences"])


@pytest.mark.parametrize("masking", ["salient", "random_span"])
def test_every_span_of_a_passage_is_as_likely(toy, masking):
  """The spans of all its sentences; for the baselines the sentences."""
  config = toy.config()
  tokenizer, table = passages.load_tokenizer(config.passages), passages.load(config.passages)
  data = MaskedSentences(
    config.knowledge_spans,
    tokenizer=tokenizer,
    query_length=24,
    max_masks=5,
    knowledge=table,
    masking=masking,
  )
  num_spans = [max(len(data.spans[row]) // 2, 1) for row in range(len(data))]
  drawn, epochs = np.zeros(len(data)), 300
  own_of = data._own.of(np.arange(len(data)))[:, 0]
  for step in range(epochs):
    queries = data.batch(step, batch_size=32, seed=0, by_passage=True)
    assert sorted(queries.own_passages[:, 0]) == list(range(32)), "each passage once"
    if masking == "salient":
      for ids, targets, mask, own in zip(
        queries.ids, queries.targets, queries.target_mask, queries.own_passages[:, 0], strict=True
      ):
        ids = ids.copy()
        ids[ids == tokenizer.mask_id] = targets[mask > 0]
        (rows,) = np.nonzero(
          [
            number == own and np.array_equal(data.ids[row], ids)
            for row, number in enumerate(own_of)
          ]
        )
        drawn[rows] += 1 / len(rows)
  if masking == "salient":
    for number in range(32):
      (rows,) = np.nonzero(own_of == number)
      shares = np.array([num_spans[row] for row in rows]) / sum(num_spans[row] for row in rows)
      np.testing.assert_allclose(
        drawn[rows] / epochs, shares, atol=0.13, err_msg=f"sentences {rows} of passage {number}"
      )
    assert len(set(num_spans)) > 1, "sentences of different numbers of spans"


def test_unknown_sampling(toy, tmp_path):
  with pytest.raises(
    artifacts.UserError, match="realm.sampling is 'spans'; use one of sentences, passages"
  ):
    pretrain.pretrain(toy.config(realm__sampling="spans"), str(tmp_path))


# ---------------------------------------------------------------------------------------------- XLA


# Six steps of ICT without XLA and with it; XLA only reports the first program that it compiles in a
# process.
PROGRAM = """
import sys
from realm_tf import cli
cli.set_switches()
from realm_tf import pretrain_ict
from tests.conftest import toy_config
root, workdir = sys.argv[1:]
for jit_compile in (False, True):
  config = toy_config(root)
  config.jit_compile, config.ict.steps = jit_compile, 6
  print(f"jit_compile={jit_compile}", file=sys.stderr, flush=True)
  pretrain_ict.pretrain_ict(config, f"{workdir}/{jit_compile}")
"""


def test_xla_trains_to_the_same_weights(toy, tmp_path):
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM, toy.root, str(tmp_path)],
    cwd=REPOSITORY,
    env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "0"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  without, _, within = done.stderr.partition("jit_compile=True")
  assert "jit_compile=False" in without and "Compiled cluster using XLA" not in without
  assert "Compiled cluster using XLA" in within, within[-3000:]
  start, *ends = (
    snapshots.load_retriever(str(folder)).trainable_weights
    for folder in (
      toy.path("ict/snapshots/00000000"),
      tmp_path / "False/snapshots/00000006",
      tmp_path / "True/snapshots/00000006",
    )
  )

  def furthest(weights):
    return max(
      np.abs(np.array(a) - np.array(b)).max() for a, b in zip(ends[0], weights, strict=True)
    )

  moved, far = furthest(start), furthest(ends[1])
  for got, wanted in zip(ends[1], ends[0], strict=True):
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6, err_msg=wanted.path)
  assert moved > 1000 * far


# ----------------------------------------------------------------------------------------- bfloat16


@pytest.mark.parametrize("trainer", [pretrain_ict.pretrain_ict, finetune.finetune])
def test_mixed_precision_computes_in_bfloat16_and_keeps_float32_weights(
  toy, tmp_path, monkeypatch, trainer
):
  models, train = [], loop.train
  monkeypatch.setattr(
    loop,
    "train",
    lambda model, batches, **what: models.append(model) or train(model, batches, **what),
  )
  losses = {}
  for mixed in (False, True):
    config = toy.config(
      mixed_precision=mixed, ict__steps=6, finetune__steps=6, finetune__sync_steps=100
    )
    trainer(config, str(tmp_path / str(mixed)))
    losses[mixed] = progress.read_metrics(str(tmp_path / str(mixed)))[-1]["loss"]
  computes = [
    {
      str(layer.compute_dtype)
      for layer in model._flatten_layers()
      if layer.name.startswith("feedforward")
    }
    for model in models
  ]
  assert computes == [{"float32"}, {"bfloat16"}]
  assert {str(weight.dtype) for weight in models[1].weights} == {"float32"}
  assert losses[True] == pytest.approx(losses[False], rel=2e-2) and losses[True] != losses[False]
  assert keras.config.dtype_policy().name == "float32"

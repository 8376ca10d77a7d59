"""configs/paper.py is the paper's.

Its values, its parameter counts, and one step of each stage at full width and length. The steps
are those of one layer: to train twelve that are alike takes gigabytes and minutes.
"""

import dataclasses
import gc
import json
import re

import keras
import numpy as np
import pytest

from beam_jobs import annotate_spans, make_passages
from configs import paper, tagger
from realm_tf import settings
from realm_tf.corpus import passages
from realm_tf.corpus.candidates import Found
from realm_tf.corpus.vocabularies import SPECIAL
from realm_tf.examples import questions
from realm_tf.examples.ict import IctExamples
from realm_tf.examples.open_qa import QaExamples
from realm_tf.models.in_batch import InBatchModel
from realm_tf.models.open_qa import OpenQaModel
from realm_tf.models.realm import RealmModel
from realm_tf.models.retriever import Retriever
from realm_tf.models.span_reader import SpanReader
from realm_tf.pipeline import __main__ as pipeline
from realm_tf.pipeline.processes import PipelineError
from realm_tf.training import loop, new_models, realm_batches
from realm_tf.training.optimizer import bert_optimizer
from tests.conftest import eagerly

BERT = 109_482_240  # BERT-base uncased with its pooler
PROJECTION = 768 * 128 + 128 + 2 * 128
MASKED_LM_HEAD = 768 * 768 + 768 + 2 * 768 + 30_522
SPAN_HEAD = 768 * 2 * 256 + 2 * 256 + 2 * 256 + 256 + 1


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  """The paper's with a fresh BERT-base of one layer in place of the published one.

  The corpus has ten passages.
  """
  root = tmp_path_factory.mktemp("paper")
  words = sorted(
    {
      word
      for year in range(10)
      for word in _article(year)["text"].lower().replace(".", " .").split()
    }
  )
  (root / "vocab.txt").write_text(
    "\n".join(
      [*SPECIAL, *words, *(f"unused{i}" for i in range(30_522 - len(SPECIAL) - len(words)))]
    )
    + "\n"
  )
  (root / "articles.jsonl").write_text(
    "".join(json.dumps(_article(year)) + "\n" for year in range(10))
  )
  (root / "questions.jsonl").write_text(
    '{"question": "who built mill 3", "answer": ["Anna Berg"]}\n'
    '{"question": "when was mill 4 built", "answer": ["19?04"], "regex": true}\n'
  )
  c = paper.get_config()
  c.run_dir, c.encoder.preset = str(root / "run"), ""
  c.encoder.num_layers = 1
  make_passages.run(
    str(root / "articles.jsonl"),
    c.passages,
    vocab=str(root / "vocab.txt"),
    max_tokens=c.corpus.max_tokens,
  )
  annotate_spans.run(c.passages, c.knowledge_spans)
  c.finetune.questions = str(root / "questions.jsonl")
  return c


@pytest.fixture(scope="module")
def retriever(config) -> Retriever:
  """Of one layer, fresh."""
  tokenizer = passages.load_tokenizer(config.passages)
  return new_models.new_retriever(settings.retriever_start(config), tokenizer)


def _article(year: int) -> dict:
  return {
    "title": f"Mill {year}",
    "text": f"Mill {year} was built by Anna Berg in {1900 + year}. "
    "It stood near Lake Orla until May 1950.",
  }


def test_values_of_the_paper():
  c = paper.get_config()
  assert (
    c.corpus.max_tokens,
    c.retriever.passage_length,
    c.retriever.query_length,
    c.reader.length,
  ) == (288, 288, 96, 384)
  assert (
    c.retriever.projection_dim,
    c.retriever.dropout,
    c.retriever.shared,
    c.retriever.pooling,
  ) == (128, 0.1, True, "cls")
  assert (
    c.ict.steps,
    c.ict.batch_size,
    c.ict.learning_rate,
    c.ict.query_length,
    c.ict.removal_rate,
  ) == (100_000, 4096, 1e-4, 64, 0.9)
  assert (c.realm.steps, c.realm.batch_size, c.realm.learning_rate, c.realm.num_candidates) == (
    200_000,
    512,
    3e-5,
    8,
  )
  assert (
    c.realm.null_passage
    and c.realm.drop_own_passage
    and not c.realm.per_token
    and c.refresh.every_steps == 500
  )
  assert (c.masking, c.reader.max_masks, c.realm.retriever_learning_rate_ratio) == (
    "salient",
    10,
    1,
  )
  f = c.finetune
  assert (f.learning_rate, f.beam, f.num_read, f.reader_length, f.max_span, f.span_dim) == (
    1e-5,
    5000,
    5,
    320,
    10,
    256,
  )
  assert not f.refresh_every_steps and f.has_answer == "raw"
  assert (c.optimizer.bias_correction, c.optimizer.min_warmup_steps) == (False, 100)  # BERT's
  assert c.realm.sampling == "passages"  # as released: each once an epoch, with one of its spans
  # BERT as it learns names from CoNLL-2003, not the rules
  assert c.corpus.tagger == "data/tagger/tagger"
  for name, train in (("nq", 79_168), ("webquestions", 3_417), ("curatedtrec", 1_353)):
    variant = paper.get_config(f"{name}+cc_news")
    epochs = variant.finetune.steps * variant.finetune.batch_size / train
    assert (
      variant.finetune.dev_questions == f"data/{name}/dev.jsonl"
      and variant.finetune.eval_every % variant.finetune.log_every == 0
    )
    assert 0.5 < variant.finetune.eval_every / train <= 1, (
      "dev questions are asked about once an epoch"
    )
    assert (
      19.5 < epochs <= 20
      and variant.corpus.pretraining == "data/cc_news/*.jsonl"
      and name in variant.finetune.questions
    )
    assert (
      variant.spans != variant.knowledge_spans
      and paper.get_config(name).spans == paper.get_config(name).knowledge_spans
    )
  with pytest.raises(
    ValueError, match="paper.py:trivia is unknown; wanted one of nq, webquestions, curatedtrec"
  ):
    paper.get_config("trivia")


def test_what_is_missing_is_said_before_work_begins(tmp_path):
  """All of it in one line, the tagger among it; and how to train that one stands in the config."""
  for folder in ("wikipedia/AA", "nq"):
    (tmp_path / folder).mkdir(parents=True)
  (tmp_path / "wikipedia/AA/wiki_00").write_text("")
  (tmp_path / "nq/train.jsonl").write_text("")
  c = paper.get_config("nq")
  c.data_dir, c.run_dir = str(tmp_path), str(tmp_path / "run")
  with pytest.raises(PipelineError) as caught:
    pipeline.run(c, config_path="configs/paper.py:nq", overrides={})
  said = str(caught.value)
  assert f"missing, and made by no stage: {tmp_path}/bert (for passages)" in said, said
  assert f"{tmp_path}/tagger/tagger (for spans" in said, said
  assert (
    f"{tmp_path}/nq/dev.jsonl (for finetune realm)" in said
    and f"{tmp_path}/nq/test.jsonl (for " in said
  ), said
  assert "wiki_" not in said and "train.jsonl" not in said and not (tmp_path / "run").exists(), said
  assert (
    "python -m realm_tf.train_tagger" in paper.__doc__ and "--workdir=DATA/tagger " in paper.__doc__
  )


def test_command_of_the_tagger_fits_its_config():
  """Every setting that the docstring's command gives is one of configs/tagger.py's.

  Its type fits.
  """
  command = paper.__doc__.split("realm_tf.train_tagger")[1].split("\n\n")[0]
  config = tagger.get_config()
  for name, value in re.findall(r"--config\.(\S+)=(\S+)", command):
    *sections, last = name.split(".")
    part = config
    for section in sections:
      part = part[section]
    part[last] = type(part[last])(value)  # a KeyError or ValueError says which
  section = config.tagger
  assert section.steps % section.log_every == 0 == section.checkpoint_every % section.log_every
  assert (
    "conll2003/eng.train" in section.train and config.vocab == config.encoder.preset == "DATA/bert"
  )


def step(model, batch, tmp_path, section) -> float:
  """The loss of one training step."""
  gc.collect()  # an earlier model and its optimizer: gigabytes that refer to each other
  optimizer = bert_optimizer(
    learning_rate=section.learning_rate, steps=section.steps, **paper.get_config().optimizer
  )
  with eagerly():
    loop.train(
      model,
      lambda _: batch,
      workdir=str(tmp_path),
      schedule=loop.Schedule(
        steps=1,
        batch_size=len(batch["query_ids"]),
        learning_rate=section.learning_rate,
        log_every=1,
        checkpoint_every=2,
      ),
      optimizer=optimizer,
    )
  row = json.loads((tmp_path / "metrics.jsonl").read_text())
  return row["loss"]


def test_parameter_counts(config, monkeypatch):
  for initializer in (keras.initializers.TruncatedNormal, keras.initializers.OrthogonalInitializer):
    # drawing 330 million numbers takes long, and they are only counted
    monkeypatch.setattr(
      initializer, "__call__", lambda self, shape, dtype=None: keras.ops.zeros(shape, dtype)
    )
  tokenizer = passages.load_tokenizer(config.passages)
  config.encoder.num_layers = paper.get_config().encoder.num_layers
  retriever, reader = settings.retriever_start(config), settings.masked_reader_start(config)
  span_reader = dataclasses.replace(settings.span_reader_start(config), warm_start="")
  config.encoder.num_layers = 1
  counts = [
    new_models.new_retriever(retriever, tokenizer).count_params(),
    new_models.new_masked_reader(reader, tokenizer).count_params(),
    new_models.new_span_reader(span_reader, tokenizer).count_params(),
  ]
  assert counts == [BERT + PROJECTION, BERT + MASKED_LM_HEAD, BERT + SPAN_HEAD]


def test_one_step_of_ict(config, retriever, tmp_path):
  tokenizer, table = passages.load_tokenizer(config.passages), passages.load(config.passages)
  data = IctExamples(
    table, tokenizer=tokenizer, query_length=config.ict.query_length, passage_length=288
  )
  batch = data.batch(0, batch_size=2, seed=0)
  assert batch["query_ids"].shape == (2, 64) and batch["passage_ids"].shape == (2, 288)
  assert np.isfinite(
    step(InBatchModel(retriever, measures_removed=True), batch, tmp_path, config.ict)
  )


def test_one_step_of_realm_and_of_fine_tuning(config, retriever, tmp_path):
  tokenizer, table = passages.load_tokenizer(config.passages), passages.load(config.passages)
  reader = new_models.new_masked_reader(settings.masked_reader_start(config), tokenizer)
  vectors = np.random.default_rng(0).normal(size=[len(table), 128]).astype(np.float32)

  class Exact:
    """Searches ten vectors; the jobs that make an index at this size have tests of their own."""

    num_rows = 10

    def __init__(self):
      self.table = table

    def search(self, query_ids, num):
      scores = np.array(retriever.embed_queries(query_ids)) @ vectors.T
      numbers = np.argsort(-scores, axis=1)[:, :num].astype(np.int32)
      return Found(numbers, np.take_along_axis(scores, numbers, 1))

  config.realm.update(batch_size=1, num_candidates=2)  # 8 and the rest take minutes on two cores
  batch = realm_batches.Batches(settings.batches(config), table, tokenizer).realm(
    0, indexed=Exact()
  )
  assert (
    batch["passage_ids"].shape == (1, 2, 288)
    and batch["reader_ids"].shape == (1, 2, 384)
    and batch["targets"].shape == (1, 10)
  )
  model = RealmModel(retriever, reader)
  assert np.isfinite(step(model, batch, tmp_path / "realm", config.realm))

  f = config.finetune
  span_reader = SpanReader(
    architecture=reader.get_config()["architecture"],
    query_length=config.retriever.query_length,
    length=f.reader_length,
    max_span=f.max_span,
    span_dim=f.span_dim,
  )
  del model, reader
  rows = questions.read_questions(f.questions)
  data = QaExamples(
    rows,
    table,
    tokenizer=tokenizer,
    search=lambda ids, texts: Exact().search(ids, min(f.beam, len(table))),
    embeddings=vectors,
    reader=span_reader,
    num_read=2,
    raw=f.has_answer == "raw",
  )
  for number, wanted in ((0, 10), (1, 1)):  # every passage has Anna Berg, one has 1904
    inputs, numbers = data.inputs(np.array([number]))
    labels = (
      data.beam_correct(np.array([number]), numbers),
      data.span_correct(np.array([number]), numbers, inputs),
    )
    assert labels[0].sum() == wanted and labels[1].shape == (1, 2, 320, 10), rows[number].text
  model = OpenQaModel(retriever.query_tower, span_reader, sep_id=tokenizer.sep_id)
  assert np.isfinite(step(model, data.batch(0, batch_size=1, seed=0), tmp_path / "finetune", f))

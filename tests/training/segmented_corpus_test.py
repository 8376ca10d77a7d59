"""A corpus trains and scores the same, in one segment or in seven."""

import dataclasses

import numpy as np
import pytest

from beam_jobs import annotate_spans, embed_passages, make_passages
from realm_tf import settings
from realm_tf.corpus import passages
from realm_tf.evaluate import evaluate_zero_shot
from realm_tf.examples import questions
from realm_tf.examples.ict import IctExamples
from realm_tf.retrieval import dense, index
from realm_tf.training.realm_batches import Batches

SEGMENT = {"one": 1_000_000, "seven": 5}
STEPS = 4


@dataclasses.dataclass
class Made:
  """A corpus with its spans and an index, and the batches of the first steps of each trainer."""

  segments: int
  ict: list[dict]
  masked_lm: list[dict]
  realm: list[dict]
  scores: dict


def make(toy, folder: str, size: int) -> Made:
  config = toy.config(
    passages=f"{folder}/passages", knowledge_spans=f"{folder}/spans", realm__holders=1
  )
  make_passages.run(
    config.corpus.knowledge,
    config.passages,
    vocab=toy.config().passages,
    max_tokens=config.corpus.max_tokens,
    segment_passages=size,
  )
  annotate_spans.run(config.passages, config.knowledge_spans)
  snapshot, indexed_at = toy.path("ict/snapshots/00000000"), f"{folder}/index"
  embed_passages.embed(
    indexed_at, snapshot=snapshot, passages_folder=config.passages, jit_compile=False
  )
  table, tokenizer = passages.load(config.passages), passages.load_tokenizer(config.passages)
  indexed = dense.load(indexed_at, table=table, snapshot=snapshot)
  config.spans = config.knowledge_spans
  batches, lengths = Batches(settings.batches(config), table, tokenizer), settings.lengths(config)
  ict = IctExamples(
    table,
    tokenizer=tokenizer,
    query_length=lengths.query_length,
    passage_length=lengths.passage_length,
  )
  rows = questions.read_questions(config.finetune.questions)
  return Made(
    segments=len(index.segments_of(indexed_at)),
    ict=[ict.batch(step, batch_size=8, seed=0) for step in range(STEPS)],
    masked_lm=[
      batches.masked_lm(step, batch_size=8, pretraining_every=2, holders=0.5, indexed=indexed)
      for step in range(STEPS)
    ],
    realm=[batches.realm(step, indexed=indexed) for step in range(STEPS)],
    scores=evaluate_zero_shot(
      toy.path("ict"),
      rows,
      clozes=False,
      bm25_baseline=False,
      index_folder=indexed_at,
      passages_folder=config.passages,
      num_candidates=3,
    ),
  )


@pytest.fixture(scope="module")
def made(toy, tmp_path_factory) -> dict[str, Made]:
  return {
    name: make(toy, str(tmp_path_factory.mktemp(name)), size) for name, size in SEGMENT.items()
  }


def test_the_corpora_have_one_segment_and_seven(made):
  assert {name: one.segments for name, one in made.items()} == {"one": 1, "seven": 7}


@pytest.mark.parametrize("trainer", ["ict", "masked_lm", "realm"])
def test_batches_are_the_same(trainer, made):
  for step, (one, seven) in enumerate(
    zip(getattr(made["one"], trainer), getattr(made["seven"], trainer), strict=True)
  ):
    assert one.keys() == seven.keys()
    for name, array in one.items():
      np.testing.assert_array_equal(seven[name], array, err_msg=f"{name} of step {step}")


def test_questions_get_the_same_scores(made):
  one, seven = made["one"].scores, made["seven"].scores
  assert all(how.startswith("7 segments: ") for how in seven.pop("searched_by").values())
  del one["searched_by"]
  assert one == seven and one["questions"] > 10 and one["recall_at_5"] > 0

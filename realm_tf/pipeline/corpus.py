"""Stages before any training: articles → passages → sentences with salient spans; questions."""

import os
from collections.abc import Sequence

from realm_tf.pipeline.plan import Plan
from realm_tf.pipeline.stage import ConfigError, Stage

_FILES = r"(knowledge|pretraining)/part-\d+\.jsonl|(questions|clozes)\.\w+\.jsonl|facts\.jsonl"


def corpus_stages(plan: Plan) -> list[Stage]:
  """Returns the stages that make passages, spans and questions.

  Raises:
    ConfigError: no articles, or nowhere to write the parts of the questions to.
  """
  section = plan.corpus
  if section.questions and not (plan.finetune.questions and plan.evaluate.questions):
    raise ConfigError(
      "corpus.questions is split into two files; name them: "
      f"--config.finetune.questions={plan.run_dir}/questions.train.jsonl "
      f"--config.evaluate.questions={plan.run_dir}/questions.test.jsonl."
    )
  if not section.knowledge:
    raise ConfigError(
      "no corpus; give your articles: --config.corpus.knowledge='docs/*.jsonl' (files, folders "
      "and globs)."
    )
  found = [_builtin(plan)] if section.builtin else []
  found += [
    _passages(plan, "passages", section.knowledge, plan.passages, _vocabulary(plan)),
    _spans(plan, "spans", plan.passages, plan.knowledge_spans),
  ]
  if section.questions:
    found.append(_questions(plan))
  if section.pretraining:
    texts = os.path.join(plan.run_dir, "passages-pretraining")
    vocabulary = [f"--vocab={plan.passages}"]
    found += [
      _passages(plan, "pretraining passages", section.pretraining, texts, vocabulary),
      _spans(plan, "pretraining spans", texts, plan.spans, knowledge=plan.passages),
    ]
  return found


def _builtin(plan: Plan) -> Stage:
  """Returns the stage that writes the built-in corpus."""
  folder = os.path.join(plan.run_dir, "corpus")
  return Stage(
    "corpus",
    (
      "quickstart_corpus.generate",
      f"--output={folder}",
      f"--seed={plan.seed}",
      f"--num_entities={plan.corpus.num_entities}",
    ),
    inputs=(),
    outputs=(os.path.join(folder, "facts.jsonl"),),
    folder=folder,
    leaves=_FILES,
  )


def _vocabulary(plan: Plan) -> list[str]:
  """Returns the flags for the source of Z's vocabulary."""
  section = plan.corpus
  if section.vocab:
    return [f"--vocab={section.vocab}"]
  also = [f"--vocab_input={section.pretraining}"] if section.pretraining else []
  return [f"--vocab_size={section.vocab_size}", *also]


def _beam(plan: Plan) -> Sequence[str]:
  return ("--", *plan.corpus.beam_args) if plan.corpus.beam_args else ()


def _passages(
  plan: Plan, name: str, articles: str, output: str, vocabulary: Sequence[str]
) -> Stage:
  read = [flag.partition("=")[2] for flag in vocabulary if not flag.startswith("--vocab_size=")]
  return Stage(
    name,
    (
      "beam_jobs.make_passages",
      f"--input={articles}",
      f"--format={plan.corpus.format}",
      f"--max_tokens={plan.corpus.max_tokens}",
      *vocabulary,
      f"--output={output}",
      *_beam(plan),
    ),
    inputs=(articles, *read),
    outputs=(output,),
    folder=output,
    advice="To add documents to the trained system, run beam_jobs.update_passages.",
  )


def _spans(plan: Plan, name: str, passages: str, output: str, *, knowledge: str = "") -> Stage:
  """Returns the stage that finds salient spans, and the passages of `knowledge` that hold them."""
  tagger = plan.corpus.tagger
  has_name = tagger == "rules" or tagger.startswith("spacy:")
  return Stage(
    name,
    (
      "beam_jobs.annotate_spans",
      f"--passages={passages}",
      *((f"--knowledge={knowledge}",) if knowledge else ()),
      f"--tagger={tagger}",
      f"--output={output}",
      *_beam(plan),
    ),
    inputs=(passages, *((knowledge,) if knowledge else ()), *(() if has_name else (tagger,))),
    outputs=(output,),
    folder=output,
  )


def _questions(plan: Plan) -> Stage:
  """Returns the stage that splits a file of questions by title."""
  section, train, test = plan.corpus, plan.finetune.questions, plan.evaluate.questions
  return Stage(
    "questions",
    (
      "realm_tf.split_questions",
      f"--input={section.questions}",
      f"--train={train}",
      f"--test={test}",
      f"--test_share={section.test_share}",
    ),
    inputs=(section.questions,),
    outputs=(train, test),
    folder=train,
  )

"""The plan of a whole run as plain values, unpacked from the config."""

import dataclasses
from collections.abc import Mapping

_HARMLESS = ("log_every", "checkpoint_every", "workdir")  # settings that results do not depend on


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Sources of passages, sentences and questions.

  Attributes:
    builtin: whether the built-in corpus is written first.
    num_entities: number of entities of the built-in corpus.
    knowledge: articles of Z: files, folders and globs, separated by commas.
    pretraining: articles of X, likewise; "" if X is Z.
    questions: file of questions to split into a training and a test part; "" for none.
    test_share: share of the titles in the test part.
    format: format of the articles.
    vocab: a BERT vocabulary; "" to learn one.
    vocab_size: most word pieces of a learned vocabulary.
    max_tokens: most word pieces of a passage.
    tagger: the tagger that finds names.
    beam_args: Beam's options.
  """

  builtin: bool
  num_entities: int
  knowledge: str
  pretraining: str
  questions: str
  test_share: float
  format: str
  vocab: str
  vocab_size: int
  max_tokens: int
  tagger: str
  beam_args: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Trainer:
  """One training.

  Attributes:
    workdir: workdir of the trainer.
    steps: steps of the training.
    init: the workdir whose newest snapshot it starts from; "" if it needs none.
  """

  workdir: str
  steps: int
  init: str = ""


@dataclasses.dataclass(frozen=True)
class FineTuning:
  """The fine-tuning of all systems.

  Attributes:
    workdir: folder with a trainer's workdir for each system.
    steps: steps of each training.
    questions: questions to train on; "" for none.
    dev_questions: questions for choosing the best snapshot; "" for none.
    reader: workdir of the reader that the span reader starts from; "" for the config's encoder.
  """

  workdir: str
  steps: int
  questions: str
  dev_questions: str
  reader: str


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """The evaluation of all systems.

  Attributes:
    questions, clozes: files of test questions, and of sentences with a blank; "" for none.
    systems: systems to fine-tune and compare.
    num_answers: number of answered questions to show at the end.
  """

  questions: str
  clozes: str
  systems: tuple[str, ...]
  num_answers: int


@dataclasses.dataclass(frozen=True)
class Plan:
  """The plan of a whole run.

  Attributes:
    run_dir: folder of the whole run.
    seed: seed of the run.
    corpus: sources of passages, sentences and questions.
    passages: folder of Z's passages.
    knowledge_spans, spans: folders with sentences of Z and of X; the same if X is Z.
    presets: the published encoders that models start from; empty if models start fresh.
    mlm, ict, recurring_spans, realm: the trainings in order; warm starts with 0 steps are skipped,
      except that ICT then publishes a fresh retriever.
    ict_from_mlm: whether ICT starts from the masked-LM warm start.
    ict_held_out: whether ICT is evaluated on held-out sentences.
    finetune: the fine-tuning of all systems.
    evaluate: the evaluation of all systems.
    servable: folder of the exported system; "" for none.
    settings: all settings that results depend on: "section.name" or "name" → value.
    config_path: the config's file; passed to the trainers.
    overrides: settings that override the file's; passed to the trainers.
  """

  run_dir: str
  seed: int
  corpus: Corpus
  passages: str
  knowledge_spans: str
  spans: str
  presets: tuple[str, ...]
  mlm: Trainer
  ict: Trainer
  recurring_spans: Trainer
  realm: Trainer
  ict_from_mlm: bool
  ict_held_out: bool
  finetune: FineTuning
  evaluate: Evaluation
  servable: str
  settings: Mapping[str, object]
  config_path: str
  overrides: Mapping[str, object]

  @property
  def start_of_realm(self) -> str:
    """The system that REALM starts from: "recurring_spans" or "ict"."""
    return "recurring_spans" if self.realm.init == self.recurring_spans.workdir else "ict"

  @property
  def evaluated(self) -> tuple[str, ...]:
    """The fine-tuned systems that are evaluated."""
    asked = self.finetune.questions and self.evaluate.questions
    return self.evaluate.systems if asked else ()

  @property
  def is_served(self) -> bool:
    """Whether the test questions are sent to a model server."""
    return bool(self.servable) and "realm" in self.evaluated


def plan_of(config, *, config_path: str, overrides: Mapping[str, object]) -> Plan:
  """Returns the plan of a config.

  Args:
    config: all settings.
    config_path: the config's file.
    overrides: settings that override the file's, name → value.
  """
  x_is_z = not config.corpus.pretraining
  return Plan(
    run_dir=config.run_dir,
    seed=config.seed,
    corpus=_fields(Corpus, config.corpus),
    passages=config.passages,
    knowledge_spans=config.knowledge_spans,
    spans=config.knowledge_spans if x_is_z else config.spans,
    presets=tuple(sorted({config.encoder.preset, config.reader_encoder.preset} - {""})),
    mlm=Trainer(config.mlm.workdir, config.mlm.steps),
    ict=Trainer(config.ict.workdir, config.ict.steps),
    recurring_spans=_fields(Trainer, config.recurring_spans),
    realm=_fields(Trainer, config.realm),
    ict_from_mlm=config.ict.from_mlm,
    ict_held_out=bool(config.ict.eval_every),
    finetune=_fields(FineTuning, config.finetune),
    evaluate=_fields(Evaluation, config.evaluate),
    servable=config.servable,
    settings=_settings(config),
    config_path=config_path,
    overrides={**overrides, **({"spans": config.knowledge_spans} if x_is_z else {})},
  )


def _fields(kind, section):
  """Makes a dataclass from a section's values with the names of its fields."""
  return kind(**{field.name: section[field.name] for field in dataclasses.fields(kind)})


def _settings(config) -> dict[str, object]:
  found: dict[str, object] = {}
  for name, value in config.to_dict().items():
    if isinstance(value, dict):
      found |= {f"{name}.{key}": one for key, one in value.items() if key not in _HARMLESS}
    else:
      found[name] = value
  return found

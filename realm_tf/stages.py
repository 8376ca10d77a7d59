"""The stages of a whole run, each one documented command: what they take, what they leave, and what they hang on."""

import dataclasses
import os
from collections.abc import Mapping, Sequence

from realm_tf import artifacts

PORT = "{port}"  # in a stage's command: where its server listens
_WORKDIR_FILES = (r"(warmup/)?(metrics\.jsonl|refresh\.log|tensorboard/.*)(\.partial-\d+)?"
                  r"|indexes/refreshing\.json")  # of a trainer
_CORPUS_FILES = r"(knowledge|pretraining)/part-\d+\.jsonl|(questions|clozes)\.\w+\.jsonl|facts\.jsonl"


class ConfigError(artifacts.UserError):
  """A config that no stages can be made of."""


@dataclasses.dataclass(frozen=True)
class Stage:
  """One command.

  Attributes:
    name: short; also in `summary.json`.
    command: a module and its flags.
    inputs: files, folders or patterns; when their content changes, the stage is out of date.
    outputs: artifacts and files that are there when the stage is done.
    folder: what `--redo` deletes.
    sections: of the config, what the stage depends on; only trainers have any.
    differs: settings of this stage alone, over the config's.
    server: a second command, which runs while the stage does; it is told by --port_file where to write its port.
    leaves: regular expression of the files below `folder` that the command leaves outside of artifacts.
  """

  name: str
  command: Sequence[str]
  inputs: Sequence[str]
  outputs: Sequence[str]
  folder: str
  sections: Sequence[str] = ()
  differs: Mapping[str, object] = dataclasses.field(default_factory=dict)
  server: Sequence[str] = ()
  leaves: str = ""


def stages(config, *, config_path: str, overrides: Mapping[str, object]) -> list[Stage]:
  """All stages that this config asks for, in order.

  Args:
    config: all settings.
    config_path, overrides: the file that it came from, and the settings given besides; handed on to the trainers.

  Raises:
    ConfigError: no corpus, or an unknown system.
  """
  found = pretraining(config, config_path, overrides)
  for kind in ("questions", "clozes"):
    if config.evaluate[kind]:
      found += [zero_shot(config, kind, name=start_of_realm(config), workdir=config.realm.init),
                zero_shot(config, kind, name="realm", workdir=config.realm.workdir),
                zero_shot(config, kind, name="bm25", workdir=config.realm.workdir, bm25=True)]
  return found + _systems(config, config_path, overrides) + _serving(config)


def pretraining(config, config_path: str, overrides: Mapping[str, object]) -> list[Stage]:
  """The corpus, the warm starts, and REALM.

  Raises:
    ConfigError: no corpus.
  """
  return corpus(config) + warm_starts(config, config_path, overrides) + [realm(config, config_path, overrides)]


def corpus(config) -> list[Stage]:
  """Articles → passages → sentences with salient spans.

  Raises:
    ConfigError: no articles.
  """
  section, found = config.corpus, []
  if not section.knowledge:
    raise ConfigError("no corpus; give your articles: --config.corpus.knowledge='docs/*.jsonl' (files, folders and globs).")
  if section.builtin:
    folder = os.path.join(config.run_dir, "corpus")
    found.append(Stage(
        "corpus", ("quickstart_corpus.generate", f"--output={folder}", f"--seed={config.seed}",
                   f"--num_entities={section.num_entities}"),
        inputs=(), outputs=(os.path.join(folder, "facts.jsonl"),), folder=folder, leaves=_CORPUS_FILES))
  beam = ("--", *section.beam_args) if section.beam_args else ()
  has_name = section.tagger == "rules" or section.tagger.startswith("spacy:")
  tagger = () if has_name else (section.tagger,)

  def passages(name: str, articles: str, output: str, vocabulary: Sequence[str]) -> Stage:
    also = [flag.partition("=")[2] for flag in vocabulary if not flag.startswith("--vocab_size=")]
    return Stage(
        name, ("beam_jobs.make_passages", f"--input={articles}", f"--format={section.format}", f"--max_tokens={section.max_tokens}",
               *vocabulary, f"--output={output}", *beam),
        inputs=(articles, *also), outputs=(output,), folder=output)

  def spans(name: str, source: str, output: str, knowledge: str = "") -> Stage:
    held_by = (f"--knowledge={knowledge}",) if knowledge else ()
    return Stage(
        name, ("beam_jobs.annotate_spans", f"--passages={source}", *held_by, f"--tagger={section.tagger}", f"--output={output}", *beam),
        inputs=(source, *([knowledge] if knowledge else []), *tagger), outputs=(output,), folder=output)

  if section.vocab:
    vocabulary = (f"--vocab={section.vocab}",)
  else:
    vocabulary = (f"--vocab_size={section.vocab_size}", *([f"--vocab_input={section.pretraining}"] if section.pretraining else []))
  found += [passages("passages", section.knowledge, config.passages, vocabulary),
            spans("spans", config.passages, config.knowledge_spans)]
  if section.questions:
    train, test = config.finetune.questions, config.evaluate.questions
    found.append(Stage("questions", ("realm_tf.questions", f"--input={section.questions}", f"--train={train}", f"--test={test}",
                                     f"--test_share={section.test_share}"),
                       inputs=(section.questions,), outputs=(train, test), folder=train))
  if section.pretraining:
    texts = os.path.join(config.run_dir, "passages-pretraining")
    found += [passages("pretraining passages", section.pretraining, texts, (f"--vocab={config.passages}",)),
              spans("pretraining spans", texts, config.spans, knowledge=config.passages)]
  return found


def _trainer(name: str, module: str, config_path: str, overrides: Mapping[str, object], *, workdir: str,
             differs: Mapping[str, object] | None = None, **what) -> Stage:
  flags = [f"--config.{path}={value}" for path, value in {**overrides, **(differs or {})}.items()]
  return Stage(name, (f"realm_tf.{module}", f"--config={config_path}", *flags, f"--workdir={workdir}"), folder=workdir,
               differs=differs or {}, leaves=_WORKDIR_FILES, **what)


def _spans(config, overrides: Mapping[str, object]) -> tuple[Mapping[str, object], list[str]]:
  """The overrides, which say so where X is Z, and the spans folders to train on."""
  if not config.corpus.pretraining:
    overrides = {**overrides, "spans": config.knowledge_spans}
  return overrides, sorted({config.knowledge_spans, overrides.get("spans", config.spans)})


def warm_starts(config, config_path: str, overrides: Mapping[str, object]) -> list[Stage]:
  """The masked-LM warm start, where the config has one, the inverse cloze task, and recurring spans, where it has them."""
  overrides, spans = _spans(config, overrides)
  mlm, ict, found = config.mlm.workdir, config.ict.workdir, []
  if config.mlm.steps:
    found.append(_trainer(
        "mlm", "pretrain_mlm", config_path, overrides, workdir=mlm,
        inputs=(config.passages, *spans, *_preset(config)),
        outputs=(_snapshot(mlm, config.mlm.steps),),
        sections=("seed", "optimizer", "reader_encoder", "retriever", "reader", "masking", "mlm")))
  held_out = spans if config.ict.eval_every else ()
  found.append(_trainer(
      "ict", "pretrain_ict", config_path, overrides, workdir=ict,
      inputs=(config.passages, *held_out, *(_warm(config) if config.ict.from_mlm else ()), *_preset(config)),
      outputs=(_snapshot(ict, config.ict.steps),),
      sections=("seed", "optimizer", "encoder", "retriever", "ict")))
  return found + ([recurring_spans(config, config_path, overrides)] if config.recurring_spans.steps else [])


def recurring_spans(config, config_path: str, overrides: Mapping[str, object], *, name: str = "recurring spans",
                    workdir: str | None = None, differs: Mapping[str, object] | None = None) -> Stage:
  """Recurring spans, or a variant of them; see `realm`."""
  overrides, _ = _spans(config, overrides)
  workdir = workdir or config.recurring_spans.workdir
  init = (differs or {}).get("recurring_spans.init", config.recurring_spans.init)
  return _trainer(
      name, "pretrain_spans", config_path, overrides, workdir=workdir, differs=differs,
      inputs=(config.passages, config.knowledge_spans, init),
      outputs=(_snapshot(workdir, config.recurring_spans.steps),),
      sections=("seed", "optimizer", "retriever", "reader", "masking", "recurring_spans", "ict"))


def start_of_realm(config) -> str:
  """The system that REALM starts from: "recurring_spans" or "ict"."""
  return "recurring_spans" if config.realm.init == config.recurring_spans.workdir else "ict"


def _warm(config) -> Sequence[str]:
  return (config.mlm.workdir,) if config.mlm.steps else ()


def _preset(config) -> Sequence[str]:
  """The folders of published encoders; a preset that has only a name is a setting."""
  presets = {config.encoder.preset, config.reader_encoder.preset}
  return sorted(preset for preset in presets if preset and artifacts.gfile.exists(preset))


def realm(config, config_path: str, overrides: Mapping[str, object], *, name: str = "realm", workdir: str | None = None,
          differs: Mapping[str, object] | None = None) -> Stage:
  """REALM pre-training, or a variant of it.

  Args:
    name, workdir: of the variant; the config's own workdir by default.
    differs: the variant's settings.
  """
  overrides, spans = _spans(config, overrides)
  workdir = workdir or config.realm.workdir
  init = (differs or {}).get("realm.init", config.realm.init)
  steps = {config.ict.workdir: config.ict.steps, config.recurring_spans.workdir: config.recurring_spans.steps}
  first_index = (_index(init, steps[init]),) if init in steps else ()
  return _trainer(
      name, "pretrain", config_path, overrides, workdir=workdir, differs=differs,
      inputs=(config.passages, *spans, *_warm(config), init, *_preset(config)),
      outputs=(_snapshot(workdir, config.realm.steps), _index(workdir, config.realm.steps), *first_index),
      sections=("seed", "optimizer", "encoder", "reader_encoder", "retriever", "reader", "masking", "warmup", "searcher",
                "realm", "refresh"))


def zero_shot(config, kind: str, *, name: str, workdir: str, bm25: bool = False) -> Stage:
  """Retrieval before any question was seen.

  Args:
    kind: "questions" or "clozes".
    name: of the system, in file names.
    workdir: whose retriever, or whose passages for BM25.
  """
  path, output = config.evaluate[kind], zero_shot_scores(config, kind, name)
  return Stage(
      f"zero-shot {kind} {name}", ("realm_tf.evaluate", f"--workdir={workdir}", *(("--retrieval=bm25",) if bm25 else ()),
                                   f"--{kind}={path}", f"--output={output.removesuffix('.metrics.json')}.jsonl"),
      inputs=(config.passages, workdir, path), outputs=(output,), folder=output)


def zero_shot_scores(config, kind: str, name: str) -> str:
  """Where `zero_shot` leaves its scores."""
  return os.path.join(config.run_dir, "zero_shot", f"{name}.{kind}.metrics.json")


def _systems(config, config_path: str, overrides: Mapping[str, object]) -> list[Stage]:
  """The systems that the config names, fine-tuned and evaluated; nothing without questions."""
  realm_ = config.realm.workdir
  reader, before = (realm_, os.path.join(realm_, "warmup")) if config.finetune.reader else ("", "")
  starts = {  # system -> what differs in config.finetune
      "closed_book": {"retrieval": "none", "reader": realm_},
      "bm25": {"retrieval": "bm25", "reader": reader},
      start_of_realm(config): {"retrieval": "dense", "retriever": config.realm.init, "reader": before},
      "realm": {"retrieval": "dense", "retriever": realm_, "reader": reader}}
  found = []
  for system in config.evaluate.systems if config.finetune.questions else ():
    if system not in starts:
      raise ConfigError(f"evaluate.systems names {system!r}; wanted some of {', '.join(starts)}.")
    start = {"retriever": realm_, **starts[system]}
    found += fine_tuning(config, config_path, overrides, name=system, differs=starts[system],
                         inputs=[*sorted({start["retriever"], start["reader"]} - {""}), *(() if reader else _preset(config))])
  return found


def fine_tuning(config, config_path: str, overrides: Mapping[str, object], *, name: str, differs: Mapping[str, object],
                inputs: Sequence[str]) -> list[Stage]:
  """One system: fine-tuned, and evaluated where there are questions for it.

  Args:
    name: of the system, in folder names.
    differs: its settings in `config.finetune`.
    inputs: the workdirs that it starts from.
  """
  workdir = os.path.join(config.finetune.workdir, name)
  dev = (config.finetune.dev_questions,) if config.finetune.dev_questions else ()
  found = [_trainer(
      f"finetune {name}", "finetune", config_path, overrides, workdir=workdir,
      differs={f"finetune.{key}": value for key, value in differs.items()},
      inputs=(config.passages, config.finetune.questions, *dev, *inputs),
      outputs=(_snapshot(workdir, config.finetune.steps),),
      sections=("seed", "optimizer", *(() if config.finetune.reader else ("encoder",)), "retriever", "finetune"))]
  if config.evaluate.questions:
    output = predictions(config, name)
    found.append(Stage(
        f"evaluate {name}", ("realm_tf.evaluate", f"--workdir={workdir}", f"--questions={config.evaluate.questions}",
                             f"--output={output}"),
        inputs=(workdir, config.evaluate.questions), outputs=(output, scores(output)), folder=output))
  return found


def _serving(config) -> list[Stage]:
  """The exported system, and all test questions put to a model server by a client."""
  if not config.servable:
    return []
  workdir = os.path.join(config.finetune.workdir, "realm") if is_served(config) else config.realm.workdir
  found = [Stage("export", ("serving.export", f"--workdir={workdir}", f"--output={config.servable}"),
                 inputs=(workdir,), outputs=(os.path.join(config.servable, "1"),), folder=config.servable)]
  if is_served(config):
    output = predictions(config, SERVED)
    found.append(Stage(
        "serve", ("serving.client", f"--server=localhost:{PORT}", f"--questions={config.evaluate.questions}", f"--output={output}",
                  "--timeout_secs=600"),
        server=("serving.model_server", f"--model_base_path={os.path.abspath(config.servable)}", "--model_name=realm", "--port=0"),
        inputs=(config.servable, config.evaluate.questions), outputs=(output,), folder=output))
  return found


SERVED = "served"  # in place of a system's name: REALM's answers as they came from the model server


def evaluated(config) -> Sequence[str]:
  """The fine-tuned systems that are evaluated."""
  return config.evaluate.systems if config.finetune.questions and config.evaluate.questions else ()


def is_served(config) -> bool:
  """Whether the test questions are put to a model server."""
  return bool(config.servable) and "realm" in evaluated(config)


def predictions(config, name: str) -> str:
  """The predictions file of a fine-tuned system."""
  return os.path.join(config.run_dir, "predictions", f"{name}.jsonl")


def scores(predictions_path: str) -> str:
  """Where an evaluation leaves its scores, beside its predictions."""
  return os.path.splitext(predictions_path)[0] + ".metrics.json"


def _snapshot(workdir: str, steps: int) -> str:
  return artifacts.step_folder(os.path.join(workdir, "snapshots"), steps)


def _index(workdir: str, steps: int) -> str:
  return artifacts.step_folder(os.path.join(workdir, "indexes"), steps)

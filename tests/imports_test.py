"""Who may import whom: DESIGN.md's house, read from the sources."""

import ast
import functools
import pathlib
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).parents[1]
PACKAGES = ("realm_tf", "beam_jobs", "serving", "configs", "quickstart_corpus", "benchmarks", "tests")

# Each file of realm_tf with the files of realm_tf that it may import. A row stands below all that it imports.
ALLOWED = {
    "errors": "",
    "paths": "",
    "json_lines": "",
    "ownership": "errors paths",
    "artifacts": "errors ownership paths",
    "input_files": "artifacts paths",
    "progress": "artifacts json_lines",
    "salient_spans": "",
    "characters": "",
    "vocabularies": "artifacts characters",
    "metrics": "characters",
    "plots": "artifacts",
    "losses": "",
    "tokenization": "characters vocabularies",
    "passages": "artifacts paths tokenization",
    "holders": "artifacts metrics passages",
    "examples": "artifacts holders passages tokenization",
    "answering": "examples passages",
    "explanations": "artifacts examples tokenization",
    "devices": "errors",
    "models.encoder": "errors",
    "models.retriever": "models.encoder",
    "models.masked_reader": "models.encoder",
    "models.span_reader": "models.encoder",
    "models.tagger": "models.encoder",
    "models.open_qa": "devices losses models.span_reader",
    "models.in_batch": "devices losses models.retriever",
    "models.realm": "devices losses models.masked_reader models.retriever",
    "optimizer": "devices",
    "snapshots": "artifacts tokenization vocabularies models.retriever models.masked_reader models.span_reader",
    "checkpoints": "artifacts paths",
    "published": "artifacts characters checkpoints paths vocabularies models.retriever models.masked_reader models.span_reader",
    "searchers": "artifacts paths",
    "index": "artifacts paths searchers",
    "refresh": "artifacts index",
    "retrieval": "artifacts metrics passages examples snapshots tokenization index models.retriever",
    "bm25": "characters passages retrieval",
    "settings": "artifacts devices errors examples passages published snapshots tokenization models.encoder models.masked_reader models.retriever",
    "block_records": "artifacts checkpoints settings",
    "recurring_spans": "errors examples holders passages tokenization models.retriever",
    "questions": "artifacts json_lines metrics ownership passages examples settings tokenization",
    "qa_examples": "answering examples index metrics passages progress questions models.span_reader",
    "prepare_questions": "artifacts input_files json_lines metrics ownership progress questions settings",
    "training": "artifacts ownership snapshots progress",
    "warm_start": "errors examples optimizer passages recurring_spans settings snapshots tokenization training models.in_batch",
    "stages": "artifacts",
    "conll": "artifacts paths",
    "span_tagger": "artifacts conll examples paths tokenization models.tagger",
}
ENTRY_POINTS = ("pretrain_ict", "pretrain_spans", "pretrain", "pretrain_mlm", "closed_book", "finetune", "evaluate", "explain", "train_tagger", "pipeline",
                "import_checkpoint", "export_checkpoint")  # in order: any above


@functools.cache
def sources(package: str) -> dict[str, ast.Module]:
  """Module name without the package → its parsed source."""
  root = REPOSITORY / package
  return {".".join(path.relative_to(root).with_suffix("").parts): ast.parse(path.read_text())
          for path in sorted(root.rglob("*.py"))}


@functools.cache
def modules() -> set[str]:
  return {f"{package}.{name}".removesuffix(".__init__") for package in PACKAGES for name in sources(package)}


def imported(tree: ast.Module) -> set[str]:
  """All modules that a source imports anywhere, functions included, as dotted names."""
  found = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f"relative import of {node.module}"
      found |= {f"{node.module}.{alias.name}" for alias in node.names}
  return found


def own_imports(tree: ast.Module, known: set[str]) -> set[str]:
  """Those of our packages: `from realm_tf.passages import Ragged` counts as realm_tf.passages."""
  found = set()
  for name in imported(tree):
    if name.split(".")[0] in PACKAGES:
      found.add(name if name in known else name.rpartition(".")[0])
  return found


def allowed_of(name: str) -> set[str]:
  if name in ENTRY_POINTS:
    return {*ALLOWED, *ENTRY_POINTS[:ENTRY_POINTS.index(name)]}
  return set(ALLOWED[name].split())


def test_the_table_has_no_cycle_and_lists_every_file():
  above = []
  for name, allowed in ALLOWED.items():
    assert set(allowed.split()) <= set(above), f"{name} stands above something that it may import"
    above.append(name)
  files = {name for name in sources("realm_tf") if not name.endswith("__init__")}
  print(sorted(files))
  assert files == {*ALLOWED, *ENTRY_POINTS}, "give a new file its place in the table"


@pytest.mark.parametrize("name", [*ALLOWED, *ENTRY_POINTS])
def test_realm_tf_imports_only_what_stands_above(name):
  got = own_imports(sources("realm_tf")[name], modules())
  outside = {module for module in got if not module.startswith("realm_tf.")}
  extra = {module.removeprefix("realm_tf.") for module in got} - allowed_of(name) - outside
  print(f"{name} imports {sorted(got)}")
  assert not outside, f"realm_tf never imports {outside}"
  assert not extra, f"{name} may import {sorted(allowed_of(name))}"


@pytest.mark.parametrize("package, others", [
    ("realm_tf", {"beam_jobs", "serving", "configs", "quickstart_corpus", "benchmarks", "tests"}),
    ("beam_jobs", {"serving", "configs", "quickstart_corpus", "benchmarks", "tests"}),
    ("serving", {"beam_jobs", "configs", "quickstart_corpus", "benchmarks", "tests"}),
    ("quickstart_corpus", {"realm_tf", "beam_jobs", "serving", "configs", "benchmarks", "tests"}),
])
def test_packages_keep_apart(package, others):
  for name, tree in sources(package).items():
    got = {module.split(".")[0] for module in imported(tree)}
    assert not got & others, f"{package}/{name}.py imports {got & others}"


def test_client_imports_no_tensorflow():
  client = sources("serving").get("client")
  if client is None:
    pytest.skip("serving/client.py is not there yet")
  assert own_imports(client, modules()) <= {"serving.signatures", "serving.predict_protocol", "realm_tf.json_lines"}


def test_no_cycles_in_what_is_imported():
  known = modules()
  edges = {f"{package}.{name}": own_imports(tree, known) for package in PACKAGES for name, tree in sources(package).items()}
  done, path = set(), []

  def visit(name: str) -> None:
    assert name not in path, " → ".join([*path[path.index(name):], name])
    if name not in done:
      path.append(name)
      for other in sorted(edges.get(name, ())):
        visit(other)
      path.pop()
      done.add(name)

  for name in sorted(edges):
    visit(name)
  print(f"{len(edges)} files, {sum(map(len, edges.values()))} imports, no cycle")
  assert sum(map(len, edges.values())) > 100


def test_models_and_losses_run_on_any_backend():
  """Keras' JAX backend needs no TensorFlow: models and losses name none."""
  for name in ("losses", "errors", "optimizer", "models.encoder", "models.retriever", "models.masked_reader", "models.span_reader", "models.tagger",
               "models.in_batch", "models.realm"):
    got = {module.split(".")[0] for module in imported(sources("realm_tf")[name])}
    assert "tensorflow" not in got and "tensorflow_text" not in got, name


def test_json_lines_is_standard_library():
  outside = {module.split(".")[0] for module in imported(sources("realm_tf")["json_lines"])} - sys.stdlib_module_names
  assert not outside, "the client starts at once, without TensorFlow"


def test_metrics_and_salient_spans_are_plain_python():
  allowed = {"dataclasses", "functools", "itertools", "re", "regex", "string", "sys", "unicodedata", "collections", "numpy"}
  for name in ("characters", "metrics", "salient_spans"):
    found = imported(sources("realm_tf")[name]) - {"realm_tf.characters"}
    assert {module.split(".")[0] for module in found} <= allowed, name

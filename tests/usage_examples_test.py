"""examples/: the script and the notebook run unchanged with small trained systems."""

import json
import os
import runpy

import pytest

from beam_jobs import embed_passages
from realm_tf import finetune
from realm_tf.models import snapshots
from tests import source_code
from tests.conftest import eagerly

EXAMPLES = source_code.REPOSITORY / "examples"
NOTEBOOK = EXAMPLES / "quickstart.ipynb"


@pytest.fixture(scope="module")
def project(toy, tmp_path_factory):
  """A folder with examples/ and runs/quickstart/, with the toy's models instead of trained ones."""
  root = tmp_path_factory.mktemp("project")
  (root / "examples").mkdir()
  pretrained = root / "runs/quickstart/realm"
  snapshot = snapshots.publish(
    str(pretrained / "snapshots"),
    3,
    {
      "retriever": snapshots.load_retriever(toy.path("ict/snapshots/00000000")),
      "reader": snapshots.load_model(toy.path("warm/snapshots/00000000"), "reader"),
    },
    tokenizer=snapshots.load_tokenizer(toy.path("ict/snapshots/00000000")),
    made_by="pretrain",
  )
  embed_passages.embed(
    str(pretrained / "indexes/00000003"),
    snapshot=snapshot,
    passages_folder=toy.config().passages,
    jit_compile=False,
  )
  config = toy.config(finetune__retriever=str(pretrained), finetune__reader=str(pretrained))
  with eagerly():
    finetune.finetune(config, str(root / "runs/quickstart/finetune/realm"))
  return root


def test_script(project, monkeypatch, capsys):
  monkeypatch.chdir(project)
  runpy.run_path(str(EXAMPLES / "ten_lines.py"))
  printed = capsys.readouterr().out.splitlines()
  assert "read in: " in printed[0]
  assert len(printed) == 1 + 5, printed


def test_notebook(project, monkeypatch):
  monkeypatch.chdir(project / "examples")  # where Jupyter runs it
  names = {}
  for cell in cells("code"):
    exec(compile("".join(cell["source"]), cell["id"], "exec"), names)  # noqa: S102
  answer, filled = names["answer"], names["filled"]
  assert answer.text and answer.text == answer.passage.text[answer.start : answer.end]
  assert "[MASK]" not in filled.text and 0 < filled.probability <= 1


def test_script_is_short():
  code = [
    line
    for line in (EXAMPLES / "ten_lines.py").read_text().splitlines()
    if line and not line.startswith('"""')
  ]
  assert len(code) <= 10


def test_notebook_has_no_outputs():
  assert os.path.getsize(NOTEBOOK) < 10_000
  for cell in cells("code"):
    assert cell["outputs"] == [] and cell["execution_count"] is None, cell["id"]


def cells(kind: str) -> list[dict]:
  notebook = json.loads(NOTEBOOK.read_text())
  assert notebook["nbformat"] == 4
  return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]

"""realm_tf/storage/ownership.py: other people's files are not deleted.

Every job refuses before it starts work.
"""

import fcntl
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import tensorflow as tf

from beam_jobs import annotate_spans, embed_passages, make_passages, refresh_index
from quickstart_corpus import generate
from realm_tf import (
  evaluate,
  export_checkpoint,
  import_checkpoint,
  prepare_questions,
  pretrain_ict,
  split_questions,
)
from realm_tf.retrieval.index_config import IndexConfig
from realm_tf.storage import artifacts, ownership, paths, publishing
from realm_tf.storage.artifacts import ArtifactError
from realm_tf.training import loop
from serving import export, export_hub
from tests.folders import make
from tests.processes import REPOSITORY


def tree(folder: pathlib.Path) -> dict[str, bytes | None]:
  """Returns everything below a folder, with the bytes of files."""
  return {
    str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
    for path in folder.rglob("*")
  }


def write(folder: pathlib.Path, **texts: str) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  for name, text in texts.items():
    (folder / name.replace("_", ".")).write_text(text)


# ------------------------------------------------------------------------------------- any artifact


def foreign_files(place):
  write(place, thesis_txt="years of work")


def a_file(place):
  place.write_text("years of work")


def a_link_to_files(place):
  write(place.parent / "elsewhere", thesis_txt="years of work")
  place.symlink_to(place.parent / "elsewhere")


def another_program_s(place):
  write(place, info_json='{"name": "my project"}', COMPLETE="")


def other_kind(place):
  make(place, kind="snapshot")


def a_file_added(place):
  make(place)
  write(place, notes_txt="mine")


def a_link_added(place):
  make(place)
  write(place.parent / "elsewhere", thesis_txt="years of work")
  (place / "link").symlink_to(place.parent / "elsewhere")


def below_a_file(place):
  place.parent.rmdir()
  place.parent.write_text("years of work")


def foreign_staging(place):
  write(place.parent / f".staging-{place.name}", thesis_txt="years of work")


@pytest.mark.parametrize(
  "before, words",
  [
    (foreign_files, "'thesis.txt'; wanted a new or empty folder"),
    (a_file, "is a file"),
    (a_link_to_files, "'thesis.txt'"),
    (another_program_s, "'COMPLETE' and 1 more"),
    (other_kind, "holds snapshot of an earlier run"),
    (a_file_added, "'notes.txt' beside"),
    (a_link_added, "'link' beside"),
    (below_a_file, "is a file"),
    (foreign_staging, "that no job left there"),
  ],
)
@pytest.mark.parametrize("written", ["P", "P/", "../out/P"])
def test_refused_before_the_work_and_all_is_as_before(before, words, written, tmp_path):
  (tmp_path / "out").mkdir()
  before(tmp_path / "out" / "P")
  was = tree(tmp_path)
  with pytest.raises(ArtifactError, match=words) as caught:
    publishing.begin(f"{tmp_path}/out/{written}", kind="things", config={}, inputs={})
  assert tree(tmp_path) == was and "\n" not in str(caught.value), caught.value


@pytest.mark.parametrize(
  "before",
  [
    lambda place: None,
    lambda place: place.mkdir(),
    make,
    lambda place: (make(place), (place / "COMPLETE").unlink()),
    lambda place: (make(place.parent / "elsewhere"), place.symlink_to(place.parent / "elsewhere")),
    lambda place: place.symlink_to(place.parent / "not there yet"),
  ],
)
def test_written(before, tmp_path):
  before(tmp_path / "P")
  was_link = (tmp_path / "P").is_symlink()
  make(tmp_path / "P", text="new")
  assert (tmp_path / "P/data.txt").read_text() == "new" and (
    tmp_path / "P"
  ).is_symlink() == was_link
  assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_a_file_that_comes_while_the_job_works_is_kept(tmp_path):
  make(tmp_path / "P", text="old")
  with pytest.raises(ArtifactError, match="notes.txt"):
    with publishing.publish(str(tmp_path / "P"), kind="things", config={}, inputs={}) as staged:
      write(pathlib.Path(staged.path), data_txt="new")
      write(tmp_path / "P", notes_txt="mine")
  assert (tmp_path / "P/notes.txt").read_text() == "mine" and (
    tmp_path / ".staging-P/data.txt"
  ).read_text() == "new"


@pytest.mark.parametrize(
  "output, words",
  [
    ("in", "is the input"),
    ("in/", "is the input"),
    ("out/../in", "is the input"),
    ("link", "is the input"),
    ("in/P", "lies in the input"),
    ("in/new/P", "lies in the input"),
    ("link/P", "lies in the input"),
    (".", "holds the input"),
  ],
)
def test_an_input_is_never_the_output(output, words, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  make(tmp_path / "in")
  (tmp_path / "out").mkdir()
  (tmp_path / "link").symlink_to("in")
  was = tree(tmp_path)
  for given in ("in", str(tmp_path / "in"), "link"):
    with pytest.raises(ArtifactError, match=words):
      publishing.begin(output, kind="things", config={}, inputs={"it": given})
    with pytest.raises(ArtifactError, match=words):
      publishing.begin(output, kind="things", config={}, inputs={}, reads=[given])
  assert tree(tmp_path) == was
  with pytest.raises(ArtifactError, match="lies in"):
    ownership.check_apart("gs://bucket/a/../in/P", ["gs://bucket/in/"])


def test_deleting_keeps_what_was_added(tmp_path):
  for step in (1, 2, 3, 4):
    make(tmp_path / artifacts.step_folder("", step))
  write(tmp_path / "00000001", notes_txt="mine")
  write(tmp_path / "00000002" / "more", notes_txt="mine")
  another_program_s(tmp_path / "00000003" / "inner")
  artifacts.prune(str(tmp_path), newest=1)
  assert set(tree(tmp_path)) - {"00000004/data.txt", "00000004/info.json", "00000004/COMPLETE"} == {
    "00000001",
    "00000001/notes.txt",
    "00000002",
    "00000002/more",
    "00000002/more/notes.txt",
    "00000003",
    "00000003/inner",
    "00000003/inner/info.json",
    "00000003/inner/COMPLETE",
    "00000004",
  }
  another_program_s(tmp_path / "00000005")
  artifacts.remove_after(str(tmp_path), 0)
  assert (
    set(os.listdir(tmp_path / "00000005")) == {"info.json", "COMPLETE"}
    and not (tmp_path / "00000004").exists()
  )


def test_a_list_that_leads_out_of_the_folder_deletes_nothing_there(tmp_path):
  make(tmp_path / "P")
  write(tmp_path, thesis_txt="years of work")
  info = json.loads((tmp_path / "P/info.json").read_text())
  (tmp_path / "P/info.json").write_text(
    json.dumps({**info, "files": {**info["files"], "../thesis.txt": info["files"]["data.txt"]}})
  )
  ownership.remove(str(tmp_path / "P"))
  assert os.listdir(tmp_path) == ["thesis.txt"]


def test_tidy_deletes_or_puts_back_what_killed_jobs_left_only(tmp_path):
  publishing.begin(str(tmp_path / "A"), kind="things", config={}, inputs={})
  make(tmp_path / "B")
  no_process = 2**22 + 1
  os.rename(tmp_path / "B", tmp_path / f".replaced-B-{no_process}")
  make(tmp_path / "C")
  shutil.copytree(tmp_path / "C", tmp_path / f".replaced-C-{no_process}")
  write(tmp_path / ".staging-mine", thesis_txt="years of work")
  write(tmp_path / ".replaced-mine", thesis_txt="years of work")
  ownership.tidy(str(tmp_path))
  assert sorted(os.listdir(tmp_path)) == [".replaced-mine", ".staging-mine", "B", "C"]


# -------------------------------------------------------------------------------------- each writer


def test_an_artifact_that_another_process_replaces_meanwhile(tmp_path, monkeypatch):
  """The folder may be gone for a moment just when its files are listed."""
  folder = str(tmp_path / "A")
  make(folder, text="old")
  names, gone = paths.names, iter([True])

  def replaced_meanwhile(path: str) -> list[str]:
    if path == folder and next(gone, False):
      raise FileNotFoundError(path)
    return names(path)

  monkeypatch.setattr(paths, "names", replaced_meanwhile)
  make(folder, text="new")
  assert artifacts.read_text(f"{folder}/data.txt") == "new" and next(gone, None) is None


def test_a_staging_folder_that_its_writer_moves_away_meanwhile(tmp_path, monkeypatch):
  folder = str(tmp_path / "A")

  def vanishes(path: str) -> None:
    monkeypatch.undo()
    raise tf.errors.FailedPreconditionError(None, None, f"{path} is not a directory")

  monkeypatch.setattr(ownership.gfile, "makedirs", vanishes)
  ownership.claim(folder)
  assert os.listdir(folder) == [ownership.WRITER]
  ownership.release(folder)


@pytest.mark.parametrize("resume", [False, True])
def test_two_processes_do_not_write_one_folder(resume, tmp_path):
  def begin() -> publishing.Publication:
    return publishing.begin(str(tmp_path / "A"), kind="things", config={}, inputs={}, resume=resume)

  first = begin()
  write(pathlib.Path(first.path), part_txt="an hour's work")
  ownership.release(first.path)
  other = os.open(first.path, os.O_RDONLY)  # as another process has it
  fcntl.flock(other, fcntl.LOCK_EX)
  was = tree(tmp_path)
  with pytest.raises(ArtifactError, match="another process is writing to .*wait until it ends"):
    begin()
  assert tree(tmp_path) == was
  os.close(other)  # it was killed
  again = begin()
  assert os.path.exists(os.path.join(again.path, "part.txt")) == resume
  again.finish({})
  assert artifacts.is_complete(again.folder) and again.path not in ownership._claims


@pytest.fixture
def docs(tmp_path) -> pathlib.Path:
  write(
    tmp_path / "docs",
    a_jsonl='{"title": "Mill", '
    '"text": "The mill was built by Anna Berg in 1845. It stands in Orla."}\n',
  )
  return tmp_path / "docs"


def test_make_passages_keeps_the_input_s_folder(docs):
  was = tree(docs)
  for given, output in (
    (f"{docs}", docs),
    (f"{docs}/*.jsonl", docs),
    (f"{docs}/a.jsonl", docs),
    (f"{docs}/", docs / "P"),
    (f"{docs}/a.jsonl", docs.parent),
    (f"{docs}/a.jsonl", docs / "a.jsonl"),
  ):
    with pytest.raises(ArtifactError):
      make_passages.run(given, str(output), vocab_size=100)
    assert tree(docs) == was, (given, output)
  done = subprocess.run(
    [
      sys.executable,
      "-m",
      "beam_jobs.make_passages",
      f"--input={docs}/*.jsonl",
      f"--output={docs}",
    ],
    cwd=REPOSITORY,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 1 and tree(docs) == was
  assert done.stderr.splitlines()[-1].startswith(
    f"make_passages: the output '{docs}' holds the input '{docs}/a.jsonl'"
  ), done.stderr


def test_every_other_job_and_trainer_refuses(toy, tmp_path):
  config, workdir = toy.config(), toy.path("ict")
  source, snapshot = config.passages, toy.path("ict/snapshots/00000000")
  place = str(tmp_path / "mine")
  write(tmp_path / "mine", thesis_txt="years of work")
  for root in ("W/snapshots/00000000", "W/indexes/00000000", "H/embedder"):
    write(tmp_path / root, thesis_txt="years of work")
  was, source_was = tree(tmp_path), tree(pathlib.Path(source))
  w, tiny = str(tmp_path / "W"), {"passages_folder": source, "jit_compile": False}
  for name, job in {
    "annotate_spans": lambda: annotate_spans.run(source, place),
    "annotate_spans over its passages": lambda: annotate_spans.run(source, source),
    "annotate_spans in its passages": lambda: annotate_spans.run(source, source + "/spans"),
    "embed_passages": lambda: embed_passages.embed(place, snapshot=snapshot, **tiny),
    "embed_passages over its snapshot": lambda: embed_passages.embed(
      snapshot, snapshot=snapshot, **tiny
    ),
    "refresh_index": lambda: refresh_index.refresh_newest(
      snapshots=toy.path("ict/snapshots"),
      passages=source,
      indexes=w + "/indexes",
      config=IndexConfig(),
      keep=1,
      embed=lambda folder, **what: embed_passages.embed(folder, **what, jit_compile=False),
    ),
    "pretrain_ict": lambda: pretrain_ict.pretrain_ict(config, w),
    "export below a file": lambda: export.export(workdir, place + "/thesis.txt"),
    "export in its snapshots": lambda: export.export(workdir, toy.path("ict/snapshots")),
    "export_hub": lambda: export_hub.export_hub(workdir, place),
    "export_hub over its snapshot": lambda: export_hub.export_hub(workdir, snapshot),
    "export_checkpoint": lambda: export_checkpoint.export(workdir, str(tmp_path / "H")),
    "import_checkpoint": lambda: import_checkpoint.import_checkpoint([str(tmp_path / "W")], w),
  }.items():
    with pytest.raises(artifacts.UserError):
      job()
      pytest.fail(f"{name} overwrote what was there")
    assert tree(tmp_path) == was and tree(pathlib.Path(source)) == source_was, name


def test_a_workdir_of_somebody_else(tmp_path):
  for name, before in {
    "checkpoints": lambda: another_program_s(tmp_path / "checkpoints" / "00000100"),
    "snapshots": lambda: foreign_files(tmp_path / "snapshots" / "7"),
    "metrics.jsonl": lambda: write(tmp_path, metrics_jsonl='{"step": 5, "accuracy": 0.5}\n'),
    "not JSON": lambda: write(tmp_path, metrics_jsonl="epoch 1\nepoch 2\n"),
  }.items():
    before()
    was = tree(tmp_path)
    with pytest.raises(artifacts.UserError, match="another workdir"):
      loop.check_workdir(str(tmp_path), 10)
    assert tree(tmp_path) == was, name
    subprocess.run(["rm", "-r", *map(str, tmp_path.iterdir())], check=True)
  loop.check_workdir(str(tmp_path), 10)


def test_files_are_not_written_over_their_input(tmp_path):
  path = tmp_path / "train.jsonl"
  path.write_text('{"question": "who", "answer": ["x"], "title": "t"}\n')
  was, given = tree(tmp_path), str(path)
  for job in (
    lambda: prepare_questions.prepare("nq", given, str(tmp_path)),
    lambda: split_questions.split_by_title(given, train=given, test=str(tmp_path / "test.jsonl")),
    lambda: evaluate.evaluate(
      str(tmp_path),
      questions_path=given,
      clozes_path=None,
      output=f"{tmp_path}/./train.jsonl",
      bm25_baseline=False,
      index_folder=None,
      passages_folder=None,
      num_passages=1,
    ),
  ):
    with pytest.raises(ArtifactError, match="is the input"):
      job()
    assert tree(tmp_path) == was


def test_a_file_s_place_is_checked_before_the_work(tmp_path):
  given = tmp_path / "q.jsonl"
  given.write_text('{"question": "who", "answer": ["x"]}\n')
  (tmp_path / "folder").mkdir()
  (tmp_path / "link").symlink_to(given)
  for path, words in (
    (tmp_path / "folder", "is a folder; give the name of a file"),
    (f"{tmp_path}/new/", "is a folder; give the name of a file"),
    (given, "is the input"),
    (tmp_path / "link", "is the input"),
  ):
    with pytest.raises(ArtifactError, match=words):
      ownership.check_file(str(path), reads=[str(given)])
  ownership.check_file(str(tmp_path / "new" / "deep" / "p.jsonl"), reads=[str(given)])
  assert (tmp_path / "new" / "deep").is_dir()


@pytest.mark.parametrize(
  "command",
  ["beam_jobs.make_passages --input=docs --output", "realm_tf.explain --question=who --workdir"],
)
def test_a_folder_s_name_that_is_not_utf8_ends_with_a_line(command, docs):
  done = subprocess.run(
    [sys.executable, "-m", *f"{command}=P\udcff".split()],
    cwd=docs.parent,
    env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
  assert "P\\udcff" in done.stderr and "is not UTF-8, but file names must be" in done.stderr
  assert os.listdir(docs.parent) == ["docs"]


def test_the_built_in_corpus_is_written_over_itself_only(tmp_path):
  generate.generate(tmp_path / "corpus", seed=0, num_entities=8)
  generate.generate(tmp_path / "corpus", seed=1, num_entities=8)
  write(tmp_path / "corpus" / "knowledge", notes_txt="mine")
  was = tree(tmp_path)
  with pytest.raises(ValueError, match="knowledge/notes.txt"):
    generate.generate(tmp_path / "corpus", seed=0, num_entities=8)
  assert tree(tmp_path) == was

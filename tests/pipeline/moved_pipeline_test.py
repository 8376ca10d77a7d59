"""realm_tf/pipeline/ without its processes.

Finished stages stay finished wherever the run is, and --redo deletes only its own files.
"""

import json
import os
import shutil

import pytest

from configs import own_corpus, quickstart
from realm_tf.models import snapshots
from realm_tf.pipeline import runner, stages
from realm_tf.pipeline.plan import plan_of
from realm_tf.pipeline.processes import PipelineError
from realm_tf.pipeline.stage import ConfigError, Stage
from realm_tf.storage import artifacts, publishing


class Run:
  """A pipeline whose stages write their outputs without doing any work."""

  def __init__(self, monkeypatch):
    self.called = []
    monkeypatch.setattr(runner.Runner, "_call", lambda runner, stage: self._call(stage))

  def _call(self, stage: Stage) -> int:
    self.called.append(stage.name)
    for path in stage.outputs:
      if os.path.splitext(path)[1]:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        artifacts.write_text(path, stage.name)
      else:
        kind = {"snapshots": snapshots.KIND, "indexes": "index"}.get(
          os.path.basename(os.path.dirname(path)), "things"
        )
        with publishing.publish(path, kind=kind, config={}, inputs={}):
          pass
    if stage.name == "realm":
      artifacts.write_text(os.path.join(stage.folder, "metrics.jsonl"), "{}\n")
    if stage.name == "corpus":
      for name in ("knowledge", "pretraining"):
        os.makedirs(os.path.join(stage.folder, name))
        artifacts.write_text(os.path.join(stage.folder, name, "part-0000.jsonl"), name)
    return 0

  def __call__(self, config) -> list[str]:
    """Returns the stages that were run now."""
    self.called.clear()
    runs = runner.Runner(config.run_dir)
    found = self.stages(config)
    runs.check(found)
    for stage in found:
      runs.run(stage, stage.name)
    return list(self.called)

  @staticmethod
  def stages(config) -> list[Stage]:
    plan = plan_of(config, config_path="c.py", overrides={"run_dir": config.run_dir})
    return stages.all_stages(plan)


def quickstart_in(run_dir: str):
  config = quickstart.get_config()
  config.run_dir = run_dir
  return config


@pytest.fixture
def run(monkeypatch, tmp_path) -> Run:
  monkeypatch.chdir(tmp_path)
  return Run(monkeypatch)


def test_a_moved_run_has_nothing_to_do(run, tmp_path, monkeypatch):
  assert len(run(quickstart_in("runs/quick"))) == 25
  for same in (
    "runs/quick",
    "runs/quick/",
    "./runs/quick",
    "runs/../runs/quick",
    str(tmp_path / "runs/quick"),
  ):
    assert run(quickstart_in(same)) == [], same
  os.rename("runs/quick", "my [v2] run, final?*")
  assert run(quickstart_in("my [v2] run, final?*")) == []
  monkeypatch.chdir(tmp_path / "runs")
  assert run(quickstart_in("../my [v2] run, final?*")) == []
  shutil.copytree("../my [v2] run, final?*", "copy", copy_function=shutil.copyfile)  # new dates
  assert run(quickstart_in("copy")) == []
  changed = quickstart_in("copy")
  changed.realm.learning_rate = 1.0
  with pytest.raises(
    PipelineError,
    match="copy/realm was trained with something else .realm.learning_rate: 0.001 before, 1.0",
  ):
    run(changed)


def test_inputs_of_one_s_own_are_known_by_their_content(run, tmp_path, monkeypatch):
  def config(run_dir: str, docs: str):
    found = own_corpus.get_config()
    found.run_dir, found.corpus.knowledge, found.encoder.preset = (
      run_dir,
      f"{docs}/a,b.txt,{docs}/[x].txt",
      f"{docs}/bert",
    )
    found.finetune.questions = found.evaluate.questions = f"{docs}/questions.jsonl"
    return found

  os.makedirs("docs/bert")
  for name in ("a,b.txt", "[x].txt", "questions.jsonl", "bert/config.json"):
    artifacts.write_text(f"docs/{name}", name)
  assert "finetune bm25" in run(config("run", "docs"))
  os.rename("docs", "data")
  monkeypatch.chdir("run")
  assert (
    run(config(".", str(tmp_path / "data"))) == run(config(str(tmp_path / "run"), "../data")) == []
  )
  artifacts.write_text("../data/questions.jsonl", "more")
  with pytest.raises(PipelineError, match="content of ../data/questions.jsonl: '[0-9a-f]*' before"):
    run(config(".", "../data"))
  artifacts.write_text("../data/questions.jsonl", "questions.jsonl")
  artifacts.write_text("../data/bert/config.json", "another")
  with pytest.raises(PipelineError, match="content of ../data/bert: '[0-9a-f]*' before"):
    run(config(".", "../data"))


def test_what_cannot_be_read_in_a_corpus_folder_stops_nothing(run):
  os.makedirs("docs/.hidden")
  os.makedirs("elsewhere")
  for name in ("docs/a.txt", "docs/.hidden/b.txt", "elsewhere/c.txt", "docs/b\udcff.txt"):
    with open(name, "w", encoding="utf-8") as file:
      file.write(name[:6])
  os.symlink("nowhere", "docs/dangling")
  os.symlink(".", "docs/loop")
  os.symlink("../elsewhere", "docs/linked")
  os.mkfifo("docs/pipe")
  config = own_corpus.get_config()
  config.run_dir, config.corpus.knowledge = "run", "docs"
  assert run(config) and run(config) == []
  artifacts.write_text("docs/.hidden/b.txt", "not read")
  assert run(config) == []
  artifacts.write_text("elsewhere/c.txt", "read through a link")
  with pytest.raises(PipelineError, match="content of docs"):
    run(config)


def own_corpus_in(run_dir: str):
  config = own_corpus.get_config()
  config.run_dir, config.corpus.knowledge = run_dir, "docs"
  config.finetune.questions = config.evaluate.questions = "questions.jsonl"
  os.makedirs("docs", exist_ok=True)
  artifacts.write_text("docs/a.txt", "an article")
  artifacts.write_text("questions.jsonl", "questions")
  return config


def files_of(folder) -> dict[str, bytes]:
  found = (path for path in folder.rglob("*") if path.is_file())
  return {str(path): path.read_bytes() for path in found if path.name != runner.STATE}


def test_nothing_is_replaced_that_something_was_trained_with(run, tmp_path):
  """The pipeline stops before any work, and says which input has changed and what to do."""
  config = own_corpus_in("run")
  run(config)
  artifacts.write_text("docs/b.txt", "a new article")
  before = files_of(tmp_path)
  for again in (
    lambda: run(config),
    lambda: runner.Runner("run").redo(run.stages(config), "finetune realm"),
  ):
    with pytest.raises(
      PipelineError,
      match="run/mlm was trained with something else .content of docs.*update_passages",
    ):
      again()
    assert run.called == [] and files_of(tmp_path) == before
  # All that was trained may go: then the corpus is made anew.
  runner.Runner("run").redo(run.stages(config), "mlm")
  assert run(config)[:3] == ["passages", "mlm", "ict"]
  assert run(config) == []


def test_what_is_trained_again_is_trained_before_what_depends_on_it(run, tmp_path):
  config = own_corpus_in("run")
  run(config)
  shutil.rmtree("run/realm")
  before = files_of(tmp_path)
  with pytest.raises(PipelineError, match="finetune.* .run/realm is missing and will be trained"):
    run(config)
  assert run.called == [] and files_of(tmp_path) == before
  shutil.rmtree("run/passages")  # comes back as it was, which changes nothing else
  runner.Runner("run").redo(run.stages(config), "realm")
  assert run(config)[0] == "passages" and run(config) == []


def test_a_new_stage_is_not_trained_before_one_that_would_change(run, tmp_path):
  config = own_corpus_in("run")
  config.recurring_spans.steps, config.realm.init = 0, "run/ict"
  run(config)
  config.recurring_spans.steps, config.realm.init = 600, "run/recurring_spans"
  with pytest.raises(PipelineError, match="run/realm was trained with something else"):
    run(config)
  assert run.called == []


def test_a_corpus_that_comes_back_as_it_was_changes_nothing(run):
  config = quickstart_in("run")
  run(config)
  shutil.rmtree("run/corpus")
  assert run(config) == ["corpus"] and run(config) == []


def test_redo_does_not_delete_an_updated_corpus(run):
  config = own_corpus_in("run")
  run(config)
  info = json.loads(artifacts.read_text("run/passages/info.json"))
  artifacts.write_text("run/passages/info.json", json.dumps(info | {"former_versions": ["before"]}))
  with pytest.raises(artifacts.UserError, match="'run/passages' has been updated since"):
    runner.Runner("run").redo(run.stages(config), "passages")
  assert os.path.exists("run/passages/COMPLETE") and os.path.exists("run/mlm")


def test_questions_to_split_need_names_for_their_parts(run):
  config = own_corpus_in("run")
  config.corpus.questions, config.evaluate.questions = "questions.jsonl", ""
  with pytest.raises(ConfigError, match="--config.evaluate.questions=run/questions.test.jsonl"):
    run(config)


def test_beam_options_change_no_result(run):
  config = own_corpus_in("run")
  run(config)
  config.corpus.beam_args = ("--direct_num_workers=2",)
  assert run(config) == []


def test_redo_deletes_what_the_stages_left_and_nothing_else(run, tmp_path):
  config = quickstart_in("run")
  run(config)
  runs = runner.Runner("run")
  for place in (
    "run/realm/thesis.txt",
    "run/realm/snapshots/00001100/thesis.txt",
    "run/servable/thesis.txt",
    "run/ict/tensorboard.txt",
  ):
    artifacts.write_text(place, "years of work")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(PipelineError, match=f"--redo=ict would delete '{place}'"):
      runs.redo(run.stages(config), "ict")
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before, place
    os.remove(place)
  runs.redo(run.stages(config), "ict")
  assert (
    os.path.exists("run/mlm") and not os.path.exists("run/ict") and not os.path.exists("run/realm")
  )
  assert len(run(config)) == 25 - 6


def test_redo_of_a_workdir_on_another_disk_keeps_the_link(run, tmp_path):
  (tmp_path / "disk/realm").mkdir(parents=True)
  (tmp_path / "run").mkdir()
  (tmp_path / "run/realm").symlink_to(tmp_path / "disk/realm")
  config = quickstart_in("run")
  run(config)
  assert os.path.exists("disk/realm/snapshots/00001100/COMPLETE")
  runner.Runner("run").redo(run.stages(config), "realm")
  assert os.path.islink("run/realm") and os.listdir("disk/realm") == []


def test_redo_keeps_files_that_no_stage_wrote(run):
  config = quickstart_in("run")
  config.corpus.questions, config.finetune.questions, config.evaluate.questions = (
    "all.jsonl",
    "train.jsonl",
    "test.jsonl",
  )
  for path in ("all.jsonl", "train.jsonl"):
    artifacts.write_text(path, "years of work")
  runner.Runner("run").redo(run.stages(config), "passages")
  assert os.path.exists("train.jsonl")

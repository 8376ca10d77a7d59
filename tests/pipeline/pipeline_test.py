"""All of REALM at toy size, in the processes that a user would start.

It is started as `python -m realm_tf.pipeline`.
"""

import json
import os
import shutil
import subprocess
import sys
import time

import absl
import numpy as np
import pytest

from configs import own_corpus, quickstart, tagger, wikipedia_small
from realm_tf.pipeline import pretraining, runner
from realm_tf.pipeline import summary as summaries
from realm_tf.pipeline.plan import plan_of
from realm_tf.pipeline.processes import PipelineError
from realm_tf.pipeline.stage import PORT, Stage
from realm_tf.pipeline.stages import all_stages
from realm_tf.storage import artifacts
from tests.processes import REPOSITORY

TINY = {
  "corpus.num_entities": 16,
  "corpus.vocab_size": 300,
  "encoder.num_layers": 1,
  "encoder.num_heads": 2,
  "encoder.hidden_dim": 16,
  "encoder.intermediate_dim": 32,
  "retriever.projection_dim": 8,
  "refresh.every_steps": 10,
  "refresh.job_args": "('--poll_secs=0.1','--nojit_compile')",
  **{
    f"{section}.{name}": value
    for section in ("mlm", "ict", "warmup", "finetune")
    for name, value in (("steps", 2), ("batch_size", 4), ("log_every", 2), ("checkpoint_every", 2))
  },
  "ict.learning_rate": 0.001,
  "realm.steps": 240,
  "realm.batch_size": 2,
  "realm.num_candidates": 3,
  "realm.log_every": 10,
  "realm.checkpoint_every": 120,
  "finetune.beam": 8,
  "finetune.num_read": 2,
  "finetune.span_dim": 8,
  "evaluate.systems": "('closed_book','realm')",
}
SYSTEMS = {"closed_book", "realm"}
NUM_STAGES = 21


def run_pipeline(
  run_dir: str, settings: dict, *flags: str, config: str = "quickstart"
) -> subprocess.CompletedProcess:
  settings = {"run_dir": run_dir, **settings}
  return subprocess.run(
    [
      sys.executable,
      "-m",
      "realm_tf.pipeline",
      f"--config=configs/{config}.py",
      *flags,
      *(f"--config.{name}={value}" for name, value in settings.items()),
    ],
    cwd=REPOSITORY,
    capture_output=True,
    text=True,
    check=False,
  )


def stages_run(done: subprocess.CompletedProcess) -> list[str]:
  """Returns the commands that the pipeline printed, without the servers beside them."""
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
  return [
    line
    for line in done.stdout.splitlines()
    if line.startswith("$ python -m ") and not line.endswith("&")
  ]


def stages_of(config, **overrides) -> dict[str, Stage]:
  """Name → stage."""
  plan = plan_of(config, config_path="c.py", overrides=overrides)
  return {stage.name: stage for stage in all_stages(plan)}


def summary_of(run_dir: str) -> dict:
  return json.loads(artifacts.read_text(os.path.join(run_dir, summaries.SUMMARY)))


@pytest.mark.timeout(900)
def test_quickstart(tmp_path):
  run_dir = str(tmp_path / "run")
  first = run_pipeline(run_dir, TINY)
  assert len(stages_run(first)) == NUM_STAGES
  expected = ("questions are longer than", "is enough.")  # a reader this small learns nothing
  said = "\n".join(
    line for line in first.stderr.splitlines() if not any(words in line for words in expected)
  )
  for noise in ("Warning", "WARNING", "W0000", "Traceback"):
    assert noise not in said, first.stderr
  summary = summary_of(run_dir)
  check_scores(summary, run_dir)
  assert summary["refreshes"] >= 1 and 0 < summary["steps_during_refreshes"] <= 240
  assert 0 < summary["max_staleness_steps"] <= summary["max_index_age_steps"] <= 240
  assert (
    f"the index in use was at most {summary['max_index_age_steps']} steps old, and at most "
    f"{summary['max_staleness_steps']} behind the newest snapshot."
  ) in first.stdout
  assert f"Then the article {summary['new_article']['title']!r} was replaced" in first.stdout
  assert os.path.getsize(os.path.join(run_dir, summaries.PLOT)) > 10_000

  # Again: nothing to do.
  started = time.monotonic()
  second = run_pipeline(run_dir, TINY)
  assert not stages_run(second) and time.monotonic() - started < 60
  assert summary_of(run_dir) == summary

  # What was deleted is made again, and nothing else; trained models stay.
  shutil.rmtree(os.path.join(run_dir, "spans-knowledge"))
  os.remove(pipeline_output := os.path.join(run_dir, "predictions", "realm.jsonl"))
  third = stages_run(run_pipeline(run_dir, TINY))
  assert len(third) == 2 and "annotate_spans" in third[0] and pipeline_output in third[1]
  again = summary_of(run_dir)
  assert {**again, "wall_secs": 0} == {**summary, "wall_secs": 0}

  # A changed training setting is not silently ignored.
  changed = run_pipeline(run_dir, {**TINY, "ict.learning_rate": 0.5})
  assert (
    changed.returncode == 1
    and "ict.learning_rate: 0.001 before, 0.5 now" in changed.stderr
    and "--redo=ict" in changed.stderr
  )


def check_scores(summary: dict, run_dir: str) -> None:
  """Every system has the scores of its evaluation."""
  assert (
    set(summary["zero_shot_recall_at_5"])
    == set(summary["zero_shot_cloze_recall_at_5"])
    == {"ict", "realm", "bm25"}
  )
  assert set(summary["exact_match"]) == SYSTEMS and set(summary["recall_at_5"]) == SYSTEMS - {
    "closed_book"
  }
  for system in SYSTEMS:
    rows = [
      json.loads(line)
      for line in open(os.path.join(run_dir, "predictions", f"{system}.jsonl"), encoding="utf-8")
    ]
    right = [
      row["prediction"].lower() in [answer.lower() for answer in row["answer"]] for row in rows
    ]
    assert abs(summary["exact_match"][system] - sum(right) / len(rows)) < 1e-3
  # an untrained retriever can have any score
  assert 0 < summary["zero_shot_recall_at_5"]["bm25"] <= 1
  assert len(summary["wall_secs"]) == NUM_STAGES and all(
    secs > 0 for secs in summary["wall_secs"].values()
  )
  check_served(summary, run_dir)
  changed = summary["new_article"]
  assert changed["before"]["answer"] in changed["before"]["text"] and changed["after"]["answer"]
  assert set(changed["secs"]) == {"update_passages", "embed_passages"}
  assert len(summary["answers"]) == 4
  for answer in summary["answers"]:
    passage, (start, end) = answer["passages"][answer["read_from"]], answer["byte_span"]
    assert passage["text"].encode()[start:end].decode() == answer["answer"]
    assert f"[{answer['answer']}]" in summaries.describe(answer, bold=False)


def check_served(summary: dict, run_dir: str) -> None:
  """The server's answers are those of the evaluation."""
  here, served = (
    [
      json.loads(line)
      for line in open(os.path.join(run_dir, "predictions", f"{name}.jsonl"), encoding="utf-8")
    ]
    for name in ("realm", "served")
  )
  assert len(here) == len(served)
  for one, other in zip(here, served, strict=True):
    for name in ("question", "prediction", "answer", "read_from", "byte_span"):
      assert one[name] == other[name], f"{name} of {one['question']}"
    np.testing.assert_allclose(one["score"], other["score"], atol=1e-5)
    read = [passage["number"] for passage in other["passages"]]
    assert read == [passage["number"] for passage in one["passages"]][: len(read)]
  assert summary["answer"] == summary["answers"][0] and summary["answer"]["question"] in [
    row["question"] for row in served
  ]


@pytest.mark.timeout(600)
def test_own_corpus_without_questions(tmp_path):
  docs = tmp_path / "docs"
  docs.mkdir()
  for number in range(30):
    lake = ("Orla", "Senta", "Vire", "Tam", "Ulm")[number % 5]
    row = {
      "title": f"Mill {number}",
      "text": f"Mill {number} was built by Anna Berg in {1800 + number}. "
      f"It stands near Lake {lake} and burned down in May {1900 + number}.",
    }
    (docs / f"{number:02d}.jsonl").write_text(json.dumps(row) + "\n")
  run_dir = str(tmp_path / "run")
  settings = {
    **TINY,
    "corpus.knowledge": f"{docs}/*.jsonl",
    "mlm.steps": 0,
    "realm.steps": 10,
    "ict.eval_every": 2,
    **{
      f"recurring_spans.{name}": TINY[f"ict.{name}"]
      for name in ("steps", "batch_size", "log_every", "checkpoint_every")
    },
  }
  stages = stages_run(run_pipeline(run_dir, settings, config="own_corpus"))
  assert [stage.split()[3].split(".")[1] for stage in stages] == [
    "make_passages",
    "annotate_spans",
    "pretrain_ict",
    "pretrain_spans",
    "pretrain",
    "export",
  ]
  summary = summary_of(run_dir)
  assert (
    not summary["exact_match"] and not summary["zero_shot_recall_at_5"] and not summary["answers"]
  )
  assert artifacts.is_complete(os.path.join(run_dir, "realm", "indexes", "00000010"))


def test_commands():
  config = quickstart.get_config()
  found = {name: stage.command for name, stage in stages_of(config, seed=1).items()}
  assert found["finetune ict"] == (
    "realm_tf.finetune",
    "--config=c.py",
    "--config.seed=1",
    "--config.finetune.retrieval=dense",
    "--config.finetune.retriever=runs/quickstart/ict",
    "--config.finetune.reader=runs/quickstart/realm/warmup",
    "--workdir=runs/quickstart/finetune/ict",
  )
  assert found["passages"][-2:] == (
    "--vocab_input=runs/quickstart/corpus/pretraining",
    "--output=runs/quickstart/passages",
  )
  config.corpus.pretraining = ""  # X is Z
  config.mlm.steps = 0
  found = {name: stage.command for name, stage in stages_of(config).items()}
  assert "pretraining spans" not in found and "mlm" not in found
  assert "--config.spans=runs/quickstart/spans-knowledge" in found["realm"]


def test_realm_starts_from_recurring_spans_where_the_config_says_so():
  config = quickstart.get_config()
  config.recurring_spans.steps, config.realm.init = 100, config.recurring_spans.workdir
  config.evaluate.systems = ("recurring_spans", "realm")
  found = stages_of(config)
  names = list(found)
  assert names.index("ict") < names.index("recurring spans") < names.index("realm")
  spans, realm = found["recurring spans"], found["realm"]
  assert spans.command == (
    "realm_tf.pretrain_spans",
    "--config=c.py",
    "--workdir=runs/quickstart/recurring_spans",
  )
  assert "runs/quickstart/ict" in spans.inputs and "runs/quickstart/recurring_spans" in realm.inputs
  assert (
    "runs/quickstart/recurring_spans/indexes/00000100" in realm.outputs
    and "runs/quickstart/ict" not in realm.inputs
  )
  assert "zero-shot questions recurring_spans" in found and "zero-shot questions ict" not in found
  plan = plan_of(config, config_path="c.py", overrides={})
  other = pretraining.realm(
    plan, name="from ict", workdir="W", differs={"realm.init": config.ict.workdir}
  )
  assert (
    "--config.realm.init=runs/quickstart/ict" in other.command
    and "runs/quickstart/ict" in other.inputs
  )
  assert "--knowledge=runs/quickstart/passages" in found["pretraining spans"].command
  config.finetune.reader, config.encoder.preset = "", os.path.dirname(__file__)
  found = stages_of(config)
  assert (
    "--config.finetune.reader=" in found["finetune realm"].command
    and config.encoder.preset in found["finetune realm"].inputs
  )
  assert not any(part.startswith("--knowledge=") for part in found["spans"].command)


def test_own_corpus_from_a_published_encoder(tmp_path):
  """The encoder is a folder or an installed package.

  The reader stays small and has the encoder's vocabulary.
  """
  config = own_corpus.get_config(str(tmp_path))
  assert config.encoder.preset == config.corpus.vocab == str(tmp_path)
  assert config.ict.title_share == 1.0, "the encoder reads titles"
  assert config.recurring_spans.steps == 0 and config.realm.init == config.ict.workdir
  assert config.reader_encoder.preset == "" and config.reader_encoder.hidden_dim == 128
  assert own_corpus.get_config("tests/conftest.py").encoder.preset.endswith("tests/conftest.py")
  assert own_corpus.get_config("absl/flags").encoder.preset == os.path.join(
    os.path.dirname(absl.__file__), "flags"
  )
  assert own_corpus.get_config("no_such_package/model").encoder.preset == "no_such_package/model"
  scratch = own_corpus.get_config()
  assert scratch.encoder.preset == "" and scratch.ict.title_share == 0.0
  assert scratch.recurring_spans.steps > 0
  assert scratch.realm.init == scratch.recurring_spans.workdir
  scratch.encoder.hidden_dim = 32
  assert scratch.reader_encoder.hidden_dim == 32, "the same settings"


def test_the_vocabulary_follows_the_encoder_and_not_the_other_way_round():
  for get_config, section in (
    (tagger.get_config, lambda config: config),
    (wikipedia_small.get_config, lambda config: config.corpus),
  ):
    config = get_config()
    config.encoder.preset = "bert"
    assert section(config).vocab == "bert"
    section(config).vocab = "mine"
    assert (config.encoder.preset, section(config).vocab) == ("bert", "mine")


def test_mistakes_are_one_line(tmp_path):
  done = run_pipeline(str(tmp_path / "run"), {}, config="own_corpus")
  assert (
    done.returncode == 1
    and done.stderr.startswith("ConfigError: no corpus; give your articles")
    and len(done.stderr.splitlines()) == 1
  )


FAKE_SERVER = """
import sys, time
path = next(word for word in sys.argv if word.startswith("--port_file=")).split("=", 1)[1]
time.sleep(0.3)
open(path + ".aside", "w").write("4711\\n")
import os
os.rename(path + ".aside", path)
time.sleep({secs})
sys.exit("out of memory")
"""
FAKE_CLIENT = """
import sys, time
time.sleep({secs})
open({output!r}, "w").write(sys.argv[1])
"""


def test_a_stage_gets_the_port_of_its_server_and_ends_with_it(tmp_path, monkeypatch):
  """The server chooses its port; if it exits, the stage does not wait for its client to notice."""
  monkeypatch.setenv("PYTHONPATH", str(tmp_path))
  output = str(tmp_path / "output")
  stage = Stage(
    "serve",
    ("fake_client", f"--server=localhost:{PORT}"),
    inputs=(),
    outputs=(output,),
    folder=output,
    server=("fake_server", "--port=0"),
  )
  (tmp_path / "fake_server.py").write_text(FAKE_SERVER.format(secs=600))
  (tmp_path / "fake_client.py").write_text(FAKE_CLIENT.format(secs=0, output=output))
  runner.Runner(str(tmp_path / "run")).run(stage, "serve")
  with open(output, encoding="utf-8") as file:
    assert file.read() == "--server=localhost:4711"
  os.remove(output)
  (tmp_path / "fake_server.py").write_text(FAKE_SERVER.format(secs=1))
  (tmp_path / "fake_client.py").write_text(FAKE_CLIENT.format(secs=600, output=output))
  started = time.monotonic()
  with pytest.raises(
    PipelineError,
    match="server beside this stage ended with code 1; its last output:\nout of memory",
  ):
    runner.Runner(str(tmp_path / "run")).run(stage, "serve")
  assert time.monotonic() - started < 60 and not os.path.exists(output)

"""The real-text benchmark: intervals by hand, what each system is trained from, and the command."""

import ast
import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import question_sets
from benchmarks.real_text import __main__ as command
from benchmarks.real_text import choice, rank, report, statistics, systems
from configs import real_text as config_file
from realm_tf import errors
from realm_tf.corpus import metrics, passages
from realm_tf.pipeline.plan import plan_of
from realm_tf.retrieval import bm25
from realm_tf.storage import artifacts
from tests.processes import REPOSITORY

NONE = np.inf  # the rank of a passage that is not found


# -------------------------------------------------------------------------------------- statistics


def test_a_rank_counts_up_to_its_depth_and_what_is_not_found_counts_nothing():
  ranks = np.array([1, 2, 5, 6, 20, 21, NONE])
  got = statistics.values_of(ranks)
  np.testing.assert_array_equal(got[:, 0], [1, 0, 0, 0, 0, 0, 0], "recall@1")
  np.testing.assert_array_equal(got[:, 1], [1, 1, 1, 0, 0, 0, 0], "recall@5")
  np.testing.assert_array_equal(got[:, 2], [1, 1, 1, 1, 1, 0, 0], "recall@20")
  wanted = [1, 1 / 2, 1 / 5, 1 / 6, 1 / 20, 1 / 21, 0]
  np.testing.assert_allclose(got[:, 3], wanted, err_msg="MRR")


def test_resamples_are_shares_and_the_same_every_time():
  drawn = statistics.draw(7, resamples=1200)
  assert drawn.shape == (1200, 7) and drawn.min() == 0, "some resample leaves out some question"
  np.testing.assert_allclose(drawn.sum(axis=1), 1, rtol=1e-6)
  np.testing.assert_allclose(drawn.mean(axis=0), 1 / 7, atol=0.02)
  np.testing.assert_array_equal(drawn, statistics.draw(7, resamples=1200))
  assert np.any(drawn != statistics.draw(7, resamples=1200, seed=1)), "another seed"


def test_the_interval_of_a_share_is_the_binomial_one():
  """For 30 of 100, the 2.5% and 97.5% quantiles of Binomial(100, 0.3) are 21 and 39."""
  values = np.repeat([1.0, 0.0], [30, 70])[None, :, None]
  got = statistics.estimate(values, statistics.draw(100))
  np.testing.assert_allclose([got.mean[0], got.low[0], got.high[0]], [0.3, 0.21, 0.39], atol=1e-6)


def test_differences_are_paired_and_seeds_are_averaged_within_a_question():
  rng = np.random.default_rng(0)
  worse = rng.integers(0, 2, [3, 200, 1]).astype(np.float64)
  resamples = statistics.draw(200)
  got = statistics.estimate(worse + 0.25 - worse, resamples)  # the same gain for each question
  np.testing.assert_allclose([got.mean, got.low, got.high], 0.25, atol=1e-6)
  alone = statistics.estimate(worse, resamples)
  assert alone.high - alone.low > 0.05, "each question differs"
  np.testing.assert_allclose(alone.mean, worse.mean())
  # If seeds contradict each other in every question, nothing is left to draw.
  opposed = np.stack([worse[0], 1 - worse[0]])
  got = statistics.estimate(opposed, resamples)
  np.testing.assert_allclose([got.mean, got.low, got.high], 0.5, atol=1e-6)


# ------------------------------------------------------------------------------------------ report


def found_of(**ranks: list[list[float]]) -> dict:
  """System → seed → ranks by both rules; the strict rule finds nothing."""
  return {
    system: {
      seed: {"answer": np.array(row), "strict": np.full(len(row), NONE)}
      for seed, row in enumerate(rows)
    }
    for system, rows in ranks.items()
  }


def test_pairs_are_compared_per_seed_and_over_those_that_both_have():
  found = found_of(
    bm25=[[1, NONE, 3, 4]] * 2,
    ict=[[2, NONE, NONE, 6], [2, 1, NONE, 4]],
    recurring_spans=[[1, 1, 1, 1]],
    realm=[[NONE] * 4, [NONE] * 4],
  )
  got = report.compare(found, found)
  assert got["questions"] == 4
  assert {system: scores["seeds"] for system, scores in got["systems"].items()} == {
    "bm25": [0, 1],
    "ict": [0, 1],
    "recurring_spans": [0],
    "realm": [0, 1],
  }
  assert got["systems"]["ict"]["answer"]["recall@5"]["mean"] == 0.5
  mrr = (1 / 2 + (0 + 1) / 2 + 0 + (1 / 6 + 1 / 4) / 2) / 4
  np.testing.assert_allclose(got["systems"]["ict"]["answer"]["MRR"]["mean"], mrr, atol=1e-6)
  assert got["systems"]["ict"]["strict"]["recall@20"] == {"mean": 0, "low": 0, "high": 0}
  gaps = {
    (row["better"], row["worse"], row["seed"]): row["answer"]["recall@5"]["mean"]
    for row in got["differences"]
  }
  assert gaps == {  # each seed by itself only if there are several
    ("recurring_spans", "ict", None): 0.75,
    ("realm", "recurring_spans", None): -1,
    ("realm", "ict", None): -0.5,
    ("realm", "ict", 0): -0.25,
    ("realm", "ict", 1): -0.75,
    ("recurring_spans", "bm25", None): 0.25,
  }


def test_the_best_system_is_chosen_on_the_dev_half():
  dev, test = (
    found_of(bm25=[[1]], ict=[[1]], realm=[[9]]),
    found_of(bm25=[[9]], ict=[[9]], realm=[[1]]),
  )
  pairs = [(row["better"], row["worse"]) for row in report.compare(dev, test)["differences"]]
  assert pairs == [("realm", "ict"), ("ict", "bm25")]
  assert report.best_of(found_of(bm25=[[1]])) == []


def test_table_and_picture(tmp_path):
  found = found_of(bm25=[[1, NONE]], ict=[[1, 4]])
  results = {
    "title": "Made up",
    "note": report.NOTE,
    "sets": {"made": {"dev": report.compare(found, found)}},
  }
  names = {"bm25": "BM25", "ict": "ICT"}
  text = report.table_of(results, names)
  lines = [" ".join(line.split()) for line in text.splitlines()]
  assert report.NOTE in lines, text
  assert "Natural Questions, SQuAD and MS MARCO" in report.NOTE
  assert "made, dev half, 2 questions; correct is a passage that holds an answer:" in lines, text
  assert (
    "BM25 50.0 [0.0, 100.0] 50.0 [0.0, 100.0] 50.0 [0.0, 100.0] 50.0 [0.0, 100.0] 0" in lines
  ), text
  assert (
    "ICT - BM25 +0.0 [+0.0, +0.0] +50.0 [+0.0, +100.0] +50.0 [+0.0, +100.0] "
    "+12.5 [+0.0, +25.0] 0" in lines
  ), text
  report.plot(results, names, path := str(tmp_path / "plot.png"))
  assert os.path.getsize(path) > 10_000


# ----------------------------------------------------------------------------------------- systems


def trained(corpus: str, start: str, **values) -> dict[str, dict[str, str]]:
  """Returns system → stage → what its command is given about starts and variants."""
  config = config_file.get_config(f"{corpus}+{start}")
  config.update_from_flattened_dict({"recurring_spans.steps": 3, "realm.steps": 7, **values})
  config.run_dir = "R"
  found = systems.systems_of(plan_of(config, config_path="c.py", overrides={"seed": 3}))
  told = (
    "--config.masking",
    "--config.refresh.every_steps",
    "--config.realm.",
    "--config.ict.",
    "--workdir",
  )
  return {
    key: {
      stage.name: " ".join(part for part in stage.command if part.startswith(told))
      for stage in system.stages
    }
    for key, system in found.items()
  }


def test_systems_from_scratch():
  found = trained("wikipedia", "scratch", **{"ict.steps": 5, "mlm.steps": 0})
  before = {"ict": "--workdir=R/ict", "recurring spans": "--workdir=R/recurring_spans"}
  init = "--config.realm.init=R/recurring_spans"
  assert found == {
    "bm25": {},
    "ict": {"ict": before["ict"]},
    "recurring_spans": before,
    "realm_from_ict": {
      "ict": before["ict"],
      "realm_from_ict": "--config.realm.init=R/ict --workdir=R/realm_from_ict",
    },
    "realm": {**before, "realm": f"{init} --workdir=R/realm"},
    "random_span": {
      **before,
      "random_span": f"{init} --config.masking=random_span --workdir=R/random_span",
    },
    "uniform": {**before, "uniform": f"{init} --config.masking=uniform --workdir=R/uniform"},
    "never_refreshed": {
      **before,
      "never_refreshed": (  # no snapshot before the last step
        f"{init} --config.refresh.every_steps=8 --workdir=R/never_refreshed"
      ),
    },
    "no_holders": {
      **before,
      "no_holders": (
        f"{init} --config.realm.holders=0 --config.realm.with_holders=0.0 --workdir=R/no_holders"
      ),
    },
  }


def test_only_realm_waits_for_a_masked_lm_that_ict_does_not_start_from():
  for from_mlm, order in ((False, ["ict"]), (True, ["mlm", "ict"])):
    settings_ = {"ict.steps": 5, "mlm.steps": 9, "ict.from_mlm": from_mlm}
    found = trained("covid", "scratch", **settings_)
    assert list(found["ict"]) == order
    assert list(found["recurring_spans"]) == [*order, "recurring spans"]
    assert list(found["realm"]) == ["mlm", "ict", "recurring spans", "realm"]


def test_systems_from_a_published_encoder():
  found = trained("covid", "published")
  assert list(found)[:4] == ["bm25", "encoder", "ict", "recurring_spans"]
  # the untrained encoder is a separate system
  assert found["encoder"] == {
    "encoder": "--config.ict.steps=0 --config.ict.workdir=R/encoder --workdir=R/encoder"
  }
  assert found["ict"] == {"ict": "--workdir=R/ict"}
  # Without ICT, the encoder is the start of the others.
  found = trained("covid", "published", **{"ict.steps": 0})
  assert list(found)[:3] == ["bm25", "encoder", "recurring_spans"] and "ict" not in found
  assert found["encoder"] == {"ict": "--workdir=R/ict"}
  assert found["realm_from_ict"]["realm_from_ict"].startswith("--config.realm.init=R/ict ")
  # Without recurring spans, REALM and its variants start from ICT.
  found = trained("wikipedia", "scratch", **{"recurring_spans.steps": 0})
  masks = ["random_span", "uniform"]
  assert list(found) == ["bm25", "ict", "realm", *masks, "never_refreshed", "no_holders"]
  assert found["realm"]["realm"].startswith("--config.realm.init=R/ict ")
  assert found["uniform"]["uniform"].startswith("--config.realm.init=R/ict ")


def test_configs_of_both_corpora():
  for corpus in config_file.CORPORA:
    for start in config_file.STARTS:
      config = config_file.get_config(f"{corpus}+{start}")
      config.data_dir = "D"
      paths = [config.corpus.knowledge, *config.question_sets.values()]
      assert all(part.startswith("D/") for path in paths for part in path.split(",")), paths
      assert not (config.servable or config.evaluate.questions or config.finetune.questions)
      assert bool(config.encoder.preset) == bool(config.corpus.vocab) == (start == "published")
  with pytest.raises(
    ValueError, match=r"no config 'covid'; wanted CORPUS\+START, of covid, wikipedia "
  ):
    config_file.get_config("covid")


# ------------------------------------------------------------------------------------- the command

TINY = {
  "corpus.vocab_size": 400,
  "corpus.max_tokens": 40,
  "encoder.num_layers": 1,
  "encoder.num_heads": 2,
  "encoder.hidden_dim": 16,
  "encoder.intermediate_dim": 32,
  "retriever.projection_dim": 8,
  "retriever.query_length": 24,
  "retriever.passage_length": 48,
  "reader.length": 72,
  "refresh.every_steps": 2,
  "refresh.job_args": "('--poll_secs=0.1','--nojit_compile')",
  **{
    f"{section}.{name}": value
    for section in ("ict", "recurring_spans", "warmup", "realm")
    for name, value in (("steps", 2), ("batch_size", 4), ("log_every", 2), ("checkpoint_every", 2))
  },
  "ict.steps": 0,
  "ict.eval_every": 0,
  "recurring_spans.eval_every": 0,
  "mlm.steps": 0,
  "realm.num_candidates": 3,
}
BUILDERS = ("Anna Berg", "Otto Falk", "Ida Holm", "Nils Krog", "Tora Lund", "Emil Rask")
NUM_MILLS = 36


def write_data(folder) -> None:
  """Papers and questions in the layout that the command expects."""
  os.makedirs(folder / "covid")
  documents, asked = [], []
  for number in range(NUM_MILLS):
    builder, title = BUILDERS[number % len(BUILDERS)], f"Mill {number}"
    lake = f"{chr(65 + number % 26)}ora"
    documents.append(
      {
        "title": title,
        "text": (
          f"The mill near Lake {lake} was built by {builder} in {1800 + number}. "
          f"It burned down when {BUILDERS[number % 5]} and {builder} were away in {1850 + number}."
        ),
      }
    )
    asked.append({"question": f"Who built {title}?", "answer": [builder], "title": title})
  asked += [
    {"question": "Who?", "answer": ["nobody"], "title": "No such paper"},
    {"question": "What?", "answer": ["  "], "title": "Mill 0"},
  ]
  for name, rows in (("documents", documents), ("questions", asked)):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "covid" / f"{name}.jsonl").write_text(text)


def run(folder, *flags: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    [
      sys.executable,
      "-m",
      "benchmarks.real_text",
      f"--data_dir={folder / 'data'}",
      f"--config.run_dir={folder / 'runs' / 'covid-scratch'}",
      "--corpus=covid",
      "--start=scratch",
      *flags,
      *(f"--config.{name}={value}" for name, value in TINY.items()),
    ],
    cwd=REPOSITORY,
    capture_output=True,
    text=True,
    check=False,
  )


def toy_config(folder):
  """Runs in this process what `run` asks for."""
  config = config_file.get_config("covid+scratch")
  values = {"refresh.job_args": ast.literal_eval(TINY["refresh.job_args"])}
  config.update_from_flattened_dict({**TINY, **values})
  config.update(data_dir=str(folder / "data"), run_dir=str(folder / "runs" / "covid-scratch"))
  return config


def started(printed: str) -> list[str]:
  """Returns the modules that the command started."""
  return [line.split()[3] for line in printed.splitlines() if line.startswith("$ python -m ")]


def rank_of(numbers, texts, titles, row, *, strict: bool) -> int | None:
  """By plain search of words in the text."""
  words = metrics.searchable(row["answer"][0])
  for at, number in enumerate(numbers, 1):
    if words in metrics.searchable(texts[number]) and (
      not strict or titles[number] == row["title"]
    ):
      return at
  return None


@pytest.fixture(scope="module")
def first(tmp_path_factory):
  folder = tmp_path_factory.mktemp("real_text")
  write_data(folder / "data")
  return folder, run(folder, "--seeds=0", "--systems=bm25,recurring_spans")


def test_the_command_trains_and_scores(first):
  folder, done = first
  ranked = "benchmarks.real_text.rank"
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
  assert started(done.stdout) == [
    "beam_jobs.make_passages",
    "beam_jobs.annotate_spans",
    ranked,
    "realm_tf.pretrain_ict",
    "realm_tf.pretrain_spans",
    ranked,
  ]
  assert "1 lines left out, no passage has its title" in done.stderr
  assert "1 lines left out, there is no answer" in done.stderr
  root = folder / "runs" / "covid-scratch"
  results = json.loads((root / "results.json").read_text())
  scored = results["sets"]["covid"]["dev"]["systems"]
  assert list(scored) == ["bm25", "recurring_spans"]
  assert list(results["sets"]["covid"]) == ["dev"], "the test half is shown if it is asked for"
  halves = {
    half: rank.read_rows(str(root / "questions" / half / "covid.jsonl")) for half in ("dev", "test")
  }
  assert sum(map(len, halves.values())) == NUM_MILLS
  for half, rows in halves.items():
    wanted = ("dev", "test").index(half)
    assert all(hashlib.sha256(row["title"].encode()).digest()[0] % 2 == wanted for row in rows)
  assert (root / "table.txt").read_text().strip() in done.stdout
  assert os.path.getsize(root / "recall.png") > 10_000
  assert not (root / "seed-0" / "ranks" / "test").exists()


def test_ranks_are_those_of_a_plain_search(first):
  root = first[0] / "runs" / "covid-scratch"
  table = passages.load(str(root / "passages"))
  asked = rank.read_rows(str(root / "questions" / "dev" / "covid.jsonl"))
  got = rank.read_rows(str(root / "seed-0" / "ranks" / "dev" / "bm25" / "covid.jsonl"))
  numbers = bm25.Bm25Searcher(table).search(
    [row["question"] for row in asked], min(100, len(table))
  )
  for row, line, found in zip(asked, got, numbers.numbers, strict=True):
    wanted = {
      name: rank_of(found, table.texts, table.titles, row, strict=name == "strict_rank")
      for name in ("answer_rank", "strict_rank")
    }
    assert line == {"question": row["question"], "title": row["title"], **wanted}, found[:5]
  assert {row["strict_rank"] for row in got} != {row["answer_rank"] for row in got}


def test_run_again_it_scores_only_what_is_new(first, capfd):
  folder, _ = first
  root = folder / "runs" / "covid-scratch"
  before = json.loads((root / "results.json").read_text())["sets"]["covid"]["dev"]
  command.run(
    toy_config(folder),
    config_path="",
    overrides={},
    seeds=[0],
    wanted=["bm25"],
    halves=["dev", "test"],
  )
  assert started(capfd.readouterr().out) == ["benchmarks.real_text.rank"], "the test half of BM25"
  results = json.loads((root / "results.json").read_text())["sets"]["covid"]
  assert results["dev"] == before, "earlier scores are kept"
  assert list(results["test"]["systems"]) == ["bm25"]
  assert results["dev"]["questions"] + results["test"]["questions"] == NUM_MILLS


def test_ranks_depend_on_snapshot_index_and_questions(first):
  seed_dir = first[0] / "runs" / "covid-scratch" / "seed-0"
  state = json.loads((seed_dir / "pipeline.json").read_text())
  known = state["ranks dev recurring_spans"]["settings"].values()
  for name in ("snapshots", "indexes"):
    made = artifacts.latest(str(seed_dir / "recurring_spans" / name))
    assert artifacts.read_info(made)["fingerprint"] in known, name
  assert len(known) == 5, "the command, passages, questions, snapshot and index"


def test_unknown_names_are_told_before_work_begins(tmp_path, capsys):
  what = {"config_path": "", "overrides": {}, "seeds": [0]}
  with pytest.raises(errors.UserError, match="--systems names ict; wanted some of bm25, re"):
    command.run(toy_config(tmp_path), wanted=["ict", "realm"], **what)
  with pytest.raises(errors.UserError, match="--halves names train; wanted some of dev, test"):
    command.run(toy_config(tmp_path), halves=["train"], **what)
  assert not os.listdir(tmp_path)
  with pytest.raises(SystemExit):
    choice.config_path(["real_text", "--config.seed", "3", "--corpus", "paper"])
  assert "invalid choice: 'paper'" in capsys.readouterr().err
  chosen = choice.config_path(["", "--corpus=wikipedia", "--seeds=1", "--start=published"])
  assert chosen == f"{config_file.__file__}:wikipedia+published"


def test_a_half_without_questions_is_told(tmp_path):
  path = tmp_path / "one.jsonl"
  path.write_text(json.dumps({"question": "who?", "answer": ["me"], "title": "The Mill"}) + "\n")
  with pytest.raises(errors.UserError, match="half of .* has no question about these passages"):
    question_sets.halves_of(str(path), {"mill"})

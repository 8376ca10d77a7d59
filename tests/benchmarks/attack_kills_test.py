"""A short run of benchmarks/attack/kills.py: kills and races lose nothing."""

import random

import pytest

from benchmarks.attack import kills, publishers
from realm_tf.storage import artifacts


def test_publishers_that_are_killed_lose_nothing(tmp_path):
  assert publishers.kill(str(tmp_path / "A"), kills=150, rng=random.Random(0)) == []


def test_publishers_that_race_mix_nothing(tmp_path):
  assert publishers.race(str(tmp_path / "A"), races=40, rng=random.Random(0)) == []


def test_killed_jobs_make_the_same(tmp_path):
  found = kills.attack(str(tmp_path), kills=2, seed=1, names=["make_passages"])
  assert len(found) == 2 and not [one.wrong for one in found if one.wrong]
  assert kills.table(found).splitlines()[-1].split()[:2] == ["make_passages", "2"]


def test_a_difference_is_told(tmp_path):
  for name, text in (("one", "x"), ("two", "y")):
    publishers.publish(str(tmp_path / name / "A"), text)
    (tmp_path / name / "metrics.jsonl").write_text('{"step": 2, "loss": 1.5}\n')
  one, two = (kills.made(str(tmp_path / name)) for name in ("one", "two"))
  assert kills._differences(one, one) == ""
  assert kills._differences(one, two) == "A is different"
  assert kills._differences(one, {**one, "B": 1}) == "B is in one run only"
  assert one["./losses"] == [(2, 1.5)]
  (tmp_path / "one/A/a").write_text("z")
  with pytest.raises(artifacts.ArtifactError, match="damaged"):
    kills.made(str(tmp_path / "one"))


def test_every_command_is_killed_by_its_weight():
  chosen = list(kills.plan(kills.COMMANDS, 100, random.Random(0)))
  counts = {command.name: chosen.count(command) for command in kills.COMMANDS}
  assert sum(counts.values()) == 100 and min(counts.values()) >= 2
  assert counts["pipeline"] < counts["finetune"]


def test_an_unknown_command_is_told(tmp_path):
  with pytest.raises(artifacts.UserError, match="no command nothing; wanted some of make_passages"):
    kills.Attack(str(tmp_path), ["nothing"])

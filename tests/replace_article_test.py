"""REALM's Table 4 as a command: an article is replaced, and the same system asked again."""

import json
import os
import subprocess
import sys

import pytest

import realm_tf
from realm_tf import replace_article
from realm_tf.storage import artifacts
from tests import fine_tuning
from tests.processes import REPOSITORY


def row(question: str, prediction: str, *answers: str, read_from: int | None = 0) -> dict:
  return {
    "question": question,
    "prediction": prediction,
    "answer": list(answers),
    "read_from": read_from,
  }


def test_a_right_answer_becomes_that_of_a_similar_question():
  rows = [
    row("who built the old mill", "Ada", "Bea", read_from=1),
    row("who built the bridge", "the Carl", "Carl", read_from=2),
    row("when did it open", "1801", "1801", read_from=3),
    row("who built the tower", "Dora", "carl", read_from=4),
    row("who designed it", "Emil", "Fritz", read_from=5),
  ]
  assert replace_article.choose(rows) == replace_article.Change(
    "who built the bridge", 2, "the Carl", "Bea"
  )
  # Without a right one, the first that was answered.
  wrong = [row("who", "Ada", "Bea", read_from=None), row("what", "x", "Bea"), row("why", "y", "z")]
  assert replace_article.choose(wrong) == replace_article.Change("what", 0, "x", "Bea")


@pytest.mark.parametrize(
  "rows", [[], [{"name": 1}], [row("who", "Ada", "Ada")], [row("who", "", "Ada")] * 2]
)
def test_too_few_predictions_are_refused(rows):
  with pytest.raises(artifacts.UserError, match="wanted two of them with different answers"):
    replace_article.choose(rows)


def test_the_same_system_reads_the_new_article(toy, served_workdirs, tmp_path):
  workdir, asked = served_workdirs["dense"], toy.path("corpus/questions.test.jsonl")
  predictions, output = str(tmp_path / "p.jsonl"), str(tmp_path / "new.json")
  fine_tuning.score(workdir, questions_path=asked, output=predictions)
  system = realm_tf.load(workdir)
  was = {
    folder: artifacts.read_info(folder)
    for folder in (system.workdir.passages, system.workdir.searched_index)
  }
  command = ["realm_tf.replace_article", f"--workdir={workdir}", f"--predictions={predictions}"]
  done = subprocess.run(
    [sys.executable, "-m", *command, f"--output={output}"],
    cwd=REPOSITORY,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  with open(output) as file:
    found = json.load(file)
  with open(predictions) as file:
    change = replace_article.choose([json.loads(line) for line in file])
  before = system.answer(found["question"])
  assert found["before"] == {"answer": before.text, "text": before.passage.text}
  assert found["before"]["answer"] == change.old and change.old in found["before"]["text"]
  assert found["new_answer"] == change.new
  assert found["title"] == before.passage.title
  table = system.workdir.table
  texts = {text.replace(change.old, change.new) for text in table.texts}
  assert found["after"]["text"] in texts | set(table.texts), "a passage of the new corpus"
  assert found["after"]["answer"] in found["after"]["text"]
  assert f"Before: {before.text}. After: {found['after']['answer']}." in done.stdout
  assert {folder: artifacts.read_info(folder) for folder in was} == was, "they were written to"
  assert sorted(os.listdir(tmp_path)) == ["new.json", "p.jsonl", "p.metrics.json"]


def test_the_new_article_is_the_old_one_with_another_answer(toy, served_workdirs):
  table = realm_tf.load(served_workdirs["dense"]).workdir.table
  title, word = table.titles[3], table.texts[3].split()[1]
  rows = replace_article.new_article(table, replace_article.Change("?", 3, word, "Sélis"))
  numbers = [number for number, other in enumerate(table.titles) if other == title]
  assert len(numbers) == 2
  assert rows == [
    {"id": title, "title": title, "text": table.texts[number].replace(word, "Sélis")}
    for number in numbers
  ]


def test_a_system_without_an_index_is_refused(fine_tuned, tmp_path):
  predictions = tmp_path / "p.jsonl"
  predictions.write_text("".join(json.dumps(row("who", x, x)) + "\n" for x in ("Quux", "Zyx")))
  with pytest.raises(artifacts.UserError, match="searches no index"):
    replace_article.replace(
      fine_tuned["bm25"], predictions=str(predictions), output=str(tmp_path / "new.json")
    )
  with pytest.raises(artifacts.UserError, match="has answers from another corpus: passage 0"):
    replace_article.replace(
      fine_tuned["dense"], predictions=str(predictions), output=str(tmp_path / "new.json")
    )
  with pytest.raises(artifacts.UserError, match="is the input"):
    replace_article.replace(
      fine_tuned["dense"], predictions=str(predictions), output=str(predictions)
    )

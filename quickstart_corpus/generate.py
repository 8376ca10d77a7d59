"""Writes the built-in corpus about an invented archipelago.

    python -m quickstart_corpus.generate --output=DIR --seed=0 --num_entities=1000

The corpus consists of passages, pre-training texts, questions and clozes.

Each entity has four facts: three for training, and one for dev or test. The knowledge states all of
them; the pre-training texts and training questions state only training facts, in different words.
So a model does well on dev and test only if it retrieves and reads.

    knowledge/part-*.jsonl
        {"title", "text"}: two passages per entity, two facts each
    pretraining/part-*.jsonl
        {"title", "text"}: each training fact three times, in texts about several entities
    questions.{train,dev,test}.jsonl
        {"question", "answer": [str], "title", "kind": "name" | "alias" | "description"}
    clozes.{dev,test}.jsonl
        {"text", "answer": [str], "span": [start, end], "title"}: span is that of the answer
    facts.jsonl
        {"title", "alias", "relation", "answer", "split"}

The same seed and number of entities produce identical files.
"""

import json
import pathlib
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags

from quickstart_corpus import tables

NUM_PARTS = 4  # files in knowledge/ and in pretraining/
DEV_SHARE = 0.4  # of the held-out facts; the others are for test
THREE_SYLLABLE_SHARE = 0.4
NICKNAME_SHARE = 0.7  # of the aliases; the others are derived from the name
TEXT_ALIAS_SHARE = 0.3  # of the pre-training sentences and clozes
QUESTION_SHARES = {"name": 0.8, "alias": 0.12, "description": 0.08}
# Names of all files written.
WRITTEN = re.compile(
  r"(knowledge|pretraining)/part-\d+\.jsonl|(questions|clozes)\.\w+\.jsonl|facts\.jsonl"
)
REPEAT_NAME_SHARE = 0.1  # how often the second sentence of a passage repeats the name


class Fact(NamedTuple):
  """A fact about an entity.

  `split` is train, dev or test; `passage` is the number of the passage, of two, that states it.
  """

  relation: tables.Relation
  answer: str
  split: str
  passage: int


class Entity(NamedTuple):
  """The subject of a passage; `alias` includes its article, as in "the Silver Fox"."""

  subject: tables.Subject
  name: str
  alias: str
  pronoun: str
  facts: tuple[Fact, ...]

  @property
  def in_a_sentence(self) -> str:
    return self.subject.article + self.name


def generate(output: str | pathlib.Path, *, seed: int, num_entities: int) -> None:
  """Writes the whole corpus to a folder, replacing an earlier one.

  Args:
    output: the folder; created if missing. It must not hold anything else.
    seed: seed of all random choices.
    num_entities: a multiple of the number of subjects.

  Raises:
    ValueError: `num_entities` cannot be divided among the subjects, or the folder holds other
      files.
  """
  if num_entities < 1 or num_entities % len(tables.SUBJECTS):
    raise ValueError(
      f"num_entities is {num_entities}; expected a positive multiple of {len(tables.SUBJECTS)}, "
      "the number of subjects"
    )
  output = pathlib.Path(output)
  _check_folder(output)
  # One generator per product, so that a change to one does not affect the others.
  world_rng, passage_rng, text_rng, question_rng, cloze_rng = np.random.default_rng(seed).spawn(5)
  entities = make_entities(world_rng, num_entities)

  _write_parts(
    output / "knowledge", [row for entity in entities for row in passages(passage_rng, entity)]
  )
  _write_parts(output / "pretraining", pretraining_documents(text_rng, entities))
  descriptive = unique_facts(entities)
  for split, num_wordings in (("train", 2), ("dev", 1), ("test", 1)):
    _write(
      output / f"questions.{split}.jsonl",
      questions(question_rng, entities, split, num_wordings=num_wordings, descriptive=descriptive),
    )
  for split, num_wordings in (("dev", 1), ("test", 2)):
    _write(
      output / f"clozes.{split}.jsonl",
      clozes(cloze_rng, entities, split, num_wordings=num_wordings),
    )
  _write(
    output / "facts.jsonl",
    (
      {
        "title": entity.name,
        "alias": entity.alias,
        "relation": fact.relation.name,
        "answer": fact.answer,
        "split": fact.split,
      }
      for entity in entities
      for fact in entity.facts
    ),
  )


# ---- the world ----


def make_entities(rng: np.random.Generator, num_entities: int) -> list[Entity]:
  """Draws the world: names, aliases and facts.

  Every name, including those of answers, is unique.
  """
  taken = _template_words()
  names = _invent_names(rng, tables.ENTITY_ENDINGS, num_entities, taken=taken)
  pools = {"year": [str(year) for year in tables.YEARS]}
  for pool, endings in tables.POOL_ENDINGS.items():
    size = max(tables.MIN_POOL_SIZE, int(tables.POOL_SHARES[pool] * num_entities))
    pools[pool] = _invent_names(rng, endings, size, taken=taken)

  num_dev = round(DEV_SHARE * num_entities)
  held_out = _shuffled(rng, ["dev"] * num_dev + ["test"] * (num_entities - num_dev))
  per_subject = num_entities // len(tables.SUBJECTS)
  aliases: set[str] = set()
  entities = []
  for number, subject in enumerate(tables.SUBJECTS):
    mine = slice(number * per_subject, (number + 1) * per_subject)
    answers = _draw_answers(rng, subject, names[mine], pools)
    nicknames = _shuffled(
      rng, [f"the {a} {n}" for a in tables.NICKNAME_ADJECTIVES for n in subject.nickname_nouns]
    )
    for i, (name, split) in enumerate(zip(names[mine], held_out[mine], strict=True)):
      if nicknames and rng.random() < NICKNAME_SHARE:
        alias = nicknames.pop()
      else:
        alias = _derived_alias(rng, name, subject, taken=aliases)
      aliases.add(alias)
      order = rng.permutation(4)  # the first two are in one passage, the last two in the other
      facts = tuple(
        Fact(subject.relations[j], answers[i][j], split if j == i % 4 else "train", passage=k // 2)
        for k, j in enumerate(order)
      )
      entities.append(Entity(subject, name, alias, _pick(rng, subject.pronouns), facts))
  return entities


def _invent_names(
  rng: np.random.Generator, endings: Sequence[str], count: int, *, taken: set[str]
) -> list[str]:
  """Draws `count` names that are not in `taken`, and adds them to it."""
  names = []
  while len(names) < count:
    middle = _pick(rng, tables.MIDDLE_SYLLABLES) if rng.random() < THREE_SYLLABLE_SHARE else ""
    name = (_pick(rng, tables.FIRST_SYLLABLES) + middle + _pick(rng, endings)).capitalize()
    if name.lower() not in taken:
      taken.add(name.lower())
      names.append(name)
  return names


def _draw_answers(
  rng: np.random.Generator,
  subject: tables.Subject,
  names: Sequence[str],
  pools: dict[str, list[str]],
) -> list[list[str]]:
  """Draws four different answers for each name, none of them a part of the name.

  A relation reuses an answer only once its pool is exhausted.
  """
  answers: list[list[str]] = [[] for _ in names]
  for relation in subject.relations:
    pool = pools[relation.pool]
    queue: list[str] = []
    for name, mine in zip(names, answers, strict=True):
      if len(queue) <= len(subject.relations):  # so that a suitable answer is always available
        queue += _shuffled(rng, pool)
      answer = next(a for a in queue if a not in mine and a.lower() not in name.lower())
      queue.remove(answer)
      mine.append(answer)
  return answers


def _derived_alias(
  rng: np.random.Generator, name: str, subject: tables.Subject, *, taken: set[str]
) -> str:
  """Derives an alias not yet taken: Talvora -> "the Talvoran Town", or with another suffix."""
  stem = name.rstrip("aeiou")
  candidates = (
    f"the {stem}{suffix} {subject.derived_noun}"
    for suffix in _shuffled(rng, tables.DERIVED_SUFFIXES)
  )
  return next(alias for alias in candidates if alias not in taken)


def _template_words() -> set[str]:
  """Returns all words in the wordings, which must not be used as names."""
  wordings = [
    wording
    for subject in tables.SUBJECTS
    for relation in subject.relations
    for wording in (*relation.passages, *relation.texts, *relation.questions)
  ]
  return set(re.findall(r"[a-z]+", " ".join(wordings).lower()))


def unique_facts(entities: Iterable[Entity]) -> set[tuple[str, str]]:
  """Returns the (relation name, answer) pairs that only one entity has."""
  counts = Counter(
    (fact.relation.name, fact.answer) for entity in entities for fact in entity.facts
  )
  return {pair for pair, count in counts.items() if count == 1}


# ---- texts about the world ----


def passages(rng: np.random.Generator, entity: Entity) -> list[dict[str, str]]:
  """States the facts of an entity in two passages.

  The first sentence names the entity, later ones seldom do; one passage mentions the alias.
  """
  alias_passage = rng.integers(2)
  rows = []
  for number in range(2):
    sentences = []
    for fact in entity.facts:
      if fact.passage != number:
        continue
      wordings = fact.relation.passages
      subject = other = entity.in_a_sentence
      if not sentences and number == alias_passage:
        # Only in these can a clause follow the name.
        wordings = [wording for wording in wordings if wording.startswith("{e}")]
        subject += _pick(rng, tables.ALIAS_CLAUSES).format(alias=entity.alias)
      elif sentences and rng.random() >= REPEAT_NAME_SHARE:
        other = f"the {entity.subject.noun}"
        subject = _pick(rng, (entity.pronoun, other))
      sentences.append(_sentence(_pick(rng, wordings).format(e=subject, o=other, a=fact.answer)))
    rows.append({"title": entity.name, "text": " ".join(sentences)})
  return rows


def pretraining_documents(
  rng: np.random.Generator, entities: Sequence[Entity]
) -> list[dict[str, str]]:
  """States every training fact in three wordings.

  A document has three or four sentences about different entities.
  """
  documents = []
  for wording in range(3):
    # Each turn takes one training fact of every entity, so a document never has two of the same.
    for turn in range(3):
      sentences = []
      for i in rng.permutation(len(entities)):
        training = [fact for fact in entities[i].facts if fact.split == "train"]
        sentences.append(_text(rng, entities[i], training[turn], fact_wording=wording)["text"])
      while sentences:
        size = rng.integers(3, 5)
        title = f"{_pick(rng, tables.JOURNALS)} {len(documents) + 1}"
        documents.append({"title": title, "text": " ".join(sentences[:size])})
        del sentences[:size]
  return documents


def clozes(
  rng: np.random.Generator, entities: Iterable[Entity], split: str, *, num_wordings: int
) -> list[dict[str, Any]]:
  """States each fact of a split as in pre-training texts, with the span of the answer."""
  return [
    _text(rng, entity, fact, fact_wording=wording)
    for entity in entities
    for fact in entity.facts
    if fact.split == split
    for wording in sorted(rng.permutation(3)[:num_wordings])
  ]


def _text(
  rng: np.random.Generator, entity: Entity, fact: Fact, *, fact_wording: int
) -> dict[str, Any]:
  """Returns a pre-training sentence, in the format of a cloze."""
  reference = entity.alias if rng.random() < TEXT_ALIAS_SHARE else entity.in_a_sentence
  before, after = fact.relation.texts[fact_wording].replace("{e}", reference).split("{a}")
  text = _sentence(before + fact.answer + after)
  return {
    "text": text,
    "answer": [fact.answer],
    "span": [len(before), len(before) + len(fact.answer)],
    "title": entity.name,
  }


def questions(
  rng: np.random.Generator,
  entities: Iterable[Entity],
  split: str,
  *,
  num_wordings: int,
  descriptive: set[tuple[str, str]],
) -> list[dict[str, Any]]:
  """Asks for each fact of a split in `num_wordings` of the wordings of its relation.

  Args:
    rng: the random generator.
    entities: the world.
    split: train, dev or test.
    num_wordings: 1 to 3.
    descriptive: (relation name, answer) pairs that identify an entity.

  Returns:
    Rows of questions.SPLIT.jsonl.
  """
  rows = []
  for entity in entities:
    for fact in entity.facts:
      if fact.split != split:
        continue
      for i in rng.permutation(3)[:num_wordings]:
        kind = _pick_kind(rng)
        description = (
          _description(rng, entity, fact, descriptive=descriptive)
          if kind == "description"
          else None
        )
        if kind == "description" and description is None:
          kind = "name"
        reference = {
          "name": entity.in_a_sentence,
          "alias": entity.alias,
          "description": description,
        }[kind]
        question = fact.relation.questions[i].format(e=reference)
        # Users type questions carelessly.
        question = question.lower() if rng.random() < 0.5 else _sentence(question)
        question += "?" if rng.random() < 0.5 else ""
        rows.append(
          {"question": question, "answer": [fact.answer], "title": entity.name, "kind": kind}
        )
  return rows


def _pick_kind(rng: np.random.Generator) -> str:
  return list(QUESTION_SHARES)[rng.choice(len(QUESTION_SHARES), p=list(QUESTION_SHARES.values()))]


def _description(
  rng: np.random.Generator, entity: Entity, fact: Fact, *, descriptive: set[tuple[str, str]]
) -> str | None:
  """Describes an entity by another of its training facts; returns None if there is none.

  Prefers a fact from the same passage.
  """
  others = [
    other
    for other in entity.facts
    if other is not fact
    and other.split == "train"
    and (other.relation.name, other.answer) in descriptive
  ]
  if not others:
    return None
  near = [other for other in others if other.passage == fact.passage]
  other = _pick(rng, near or others)
  return other.relation.description.format(a=other.answer)


# ---- helpers ----


def _pick(rng: np.random.Generator, items: Sequence[Any]) -> Any:
  return items[rng.integers(len(items))]


def _shuffled(rng: np.random.Generator, items: Sequence[Any]) -> list[Any]:
  return [items[i] for i in rng.permutation(len(items))]


def _sentence(text: str) -> str:
  return text[0].upper() + text[1:]


def _check_folder(folder: pathlib.Path) -> None:
  if folder.exists() and not folder.is_dir():
    raise ValueError(f"{str(folder)!r} is a file; give a new or empty folder")
  found = sorted(
    str(path.relative_to(folder))
    for path in folder.rglob("*")
    if not path.is_dir() or path.is_symlink()
  )
  if others := [name for name in found if not WRITTEN.fullmatch(name)]:
    raise ValueError(
      f"{str(folder)!r} holds {others[0]!r}, which is not part of this corpus; give a new or empty "
      "folder"
    )


def _write(path: pathlib.Path, rows: Iterable[dict[str, Any]]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _write_parts(folder: pathlib.Path, rows: Sequence[dict[str, Any]]) -> None:
  """Writes rows to several files, in order if the files are read in the order of their names."""
  size = -(-len(rows) // NUM_PARTS)
  for part in range(NUM_PARTS):
    _write(folder / f"part-{part:04d}.jsonl", rows[part * size : (part + 1) * size])


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(
      f"got {argv[1:]}, expected flags only: --output=DIR --seed=0 --num_entities=1000"
    )
  try:
    generate(FLAGS.output, seed=FLAGS.seed, num_entities=FLAGS.num_entities)
  except ValueError as error:
    sys.exit(f"quickstart_corpus: {error}")
  print(f"Wrote {FLAGS.output}")


if __name__ == "__main__":
  FLAGS = flags.FLAGS
  flags.DEFINE_string("output", None, "Folder to write.", required=True)
  flags.DEFINE_integer("seed", 0, "Seed of all random choices.")
  flags.DEFINE_integer("num_entities", 1000, "Number of entities; a multiple of 8.")
  app.run(main)

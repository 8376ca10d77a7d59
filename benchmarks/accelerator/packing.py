"""Makes the packed data from passages, spans and questions."""

import collections
import itertools
import os
from collections.abc import Collection, Iterable, Sequence, Sized

import numpy as np

from benchmarks import question_sets
from benchmarks.accelerator.packed import NONE, Packed, firsts
from realm_tf.checkpoints import published_models
from realm_tf.corpus import metrics, passages
from realm_tf.corpus.candidates import NULL_PASSAGE
from realm_tf.corpus.passages import PassageTable
from realm_tf.examples.packing import title_room
from realm_tf.examples.sentences import sentence_ranges
from realm_tf.retrieval import bm25
from realm_tf.spans import rules
from realm_tf.spans.holders import MAX_HOLDERS, Holders
from realm_tf.storage import artifacts

_DEPTH = 20  # of BM25's list


def pack(
  run: str,
  question_files: Sequence[str],
  output: str,
  *,
  length: int,
  title_length: int | None,
  max_clozes: int,
  encoder: str,
  query_length: int,
  max_masks: int,
  seed: int,
) -> Packed:
  """Packs the corpus of a run and writes it.

  Args:
    run: folder with passages and spans.
    question_files: jsonl files with titles; the name of the file is the name of the set.
    output: path of the packed data.
    length: length of packed passages.
    title_length: word pieces taken of a title; None: at most half of the passage.
    max_clozes: a sample of at most this many is kept.
    encoder: folder of a published BERT whose weights are included, or "".
    query_length: length of packed queries; spans beyond it are dropped.
    max_masks: longer spans are dropped.
    seed: seed of the sample.
  """
  folder = os.path.join(run, "passages")
  table, tokenizer = passages.load(folder), passages.load_tokenizer(folder)
  if tokenizer.size > 1 << 16:
    raise artifacts.UserError(
      f"the vocabulary has {tokenizer.size} word pieces; 16 bits hold at most {1 << 16}."
    )
  spans = os.path.join(run, "spans")
  for name in ("passages", "knowledge"):
    artifacts.check_input(spans, name, folder)
  corpus = _corpus(table, length=length, title_length=title_length)
  clozes = _clozes(
    spans,
    table,
    corpus,
    max_clozes=max_clozes,
    room=query_length - 2,
    max_masks=max_masks,
    seed=seed,
  )
  architecture, weights = _encoder(encoder)
  if encoder and architecture["vocabulary_size"] != tokenizer.size:
    raise artifacts.UserError(
      f"{encoder!r} has {architecture['vocabulary_size']} word pieces, but the "
      f"passages were made with {tokenizer.size}; make them with its vocab.txt."
    )
  result = Packed(
    facts={
      "vocabulary_size": tokenizer.size,
      "cls": tokenizer.cls_id,
      "sep": tokenizer.sep_id,
      "mask": tokenizer.mask_id,
      "length": length,
      "sets": [os.path.basename(path).split(".")[0] for path in question_files],
    },
    continues=tokenizer.continues,
    **corpus,
    **clozes,
    **_questions(question_files, table, tokenizer),
    architecture=architecture,
    encoder=weights,
  )
  result.save(output)
  return result


def _corpus(table: PassageTable, *, length: int, title_length: int | None) -> dict[str, np.ndarray]:
  """Returns titles, texts and sentences, cut as in `examples.packing`."""
  most = title_room(length, title_length)
  numbers: dict[str, int] = {}
  titles, title_of, texts, starts, counts = [], [], [], [], []
  for number, title in enumerate(table.titles):
    if title not in numbers:
      numbers[title] = len(numbers)
      titles.append(table.title_ids[number][:most])
    title_of.append(numbers[title])
    room = length - passages.SPECIAL_TOKENS - len(titles[numbers[title]])
    text = table.text_ids[number][:room]
    first, last = sentence_ranges(table.token_starts[number], table.sentence_starts[number])
    kept = [
      start for start, end in zip(first, last, strict=True) if start < end and start < len(text)
    ]
    texts.append(text)
    starts.append(kept)
    counts.append(len(kept))
  return {
    "title_ids": _flat(titles, np.uint16),
    "title_counts": _sizes(titles),
    "passage_titles": np.array(title_of, np.int32),
    "text_ids": _flat(texts, np.uint16),
    "text_counts": _sizes(texts),
    "sentence_starts": _flat(starts, np.uint16),
    "sentence_counts": np.array(counts, np.uint16),
  }


def _flat(rows: Iterable[Sequence[int] | np.ndarray], dtype) -> np.ndarray:
  return np.fromiter(itertools.chain.from_iterable(rows), dtype)


def _sizes(rows: Sequence[Sized], dtype=np.uint16) -> np.ndarray:
  return np.array([len(row) for row in rows], dtype)


# ------------------------------------------------------------------------------------------- clozes


def _clozes(
  folder: str,
  table: PassageTable,
  corpus: dict,
  *,
  max_clozes: int,
  room: int,
  max_masks: int,
  seed: int,
) -> dict[str, np.ndarray]:
  """Returns sentences with spans, as ranges of the passages, and the other holders of each span."""
  rows = [
    row
    for path in passages.shard_paths(folder, rules.KIND)
    for row in passages.read_shard(path, passages.Sentence)
  ]
  first_sentence = firsts(corpus["sentence_counts"])
  sentences, spans = [], []
  for row in rows:
    number, size = row.passage, corpus["text_counts"][row.passage]
    starts = corpus["sentence_starts"][first_sentence[number] : first_sentence[number + 1]]
    at = _find(table.text_ids[number], starts, row.ids)
    if at is None:
      continue  # cut off
    limit = min(room, int(size) - int(starts[at]))
    fitting = [
      (start, end, phrase)
      for start, end, phrase in zip(row.span_starts, row.span_ends, row.span_phrases, strict=True)
      if end <= limit and end - start <= max_masks
    ]
    if fitting:
      sentences.append(first_sentence[number] + at)
      spans.append(fitting)
  keep = np.arange(len(spans))
  if len(keep) > max_clozes:
    keep = np.sort(np.random.default_rng(seed).choice(keep, max_clozes, replace=False))
  sentences, spans = ([column[i] for i in keep] for column in (sentences, spans))
  starts, ends, phrases = np.array(list(itertools.chain(*spans)), np.int64).reshape(-1, 3).T
  useful = np.unique(phrases)
  held = Holders.load(folder).of(useful)
  several = held[:, 1] != NULL_PASSAGE  # the span's own passage and another one
  useful, held = useful[several], held[several]
  if not len(useful):
    raise artifacts.UserError(
      f"no span of {folder!r} is in 1 to {MAX_HOLDERS} other passages; annotate more passages."
    )
  near = np.minimum(np.searchsorted(useful, phrases), len(useful) - 1)
  return {
    "cloze_sentences": np.array(sentences, np.int32),
    "span_counts": _sizes(spans),
    "span_starts": starts.astype(np.uint8),
    "span_ends": ends.astype(np.uint8),
    "span_phrases": np.where(useful[near] == phrases, near, NONE).astype(np.int32),
    "phrase_passages": held[held != NULL_PASSAGE],
    "phrase_counts": np.sum(held != NULL_PASSAGE, axis=1).astype(np.uint16),
  }


def _find(text: np.ndarray, starts: Sequence[int], ids: Sequence[int]) -> int | None:
  """Finds which sentence of a passage these word pieces are; None if it was cut off."""
  for at, start in enumerate(starts):
    if text[start] == ids[0] and np.array_equal(text[start : start + len(ids)], ids):
      return at
  return None


# ---------------------------------------------------------------------------------------- questions


def _questions(paths: Sequence[str], table: PassageTable, tokenizer) -> dict[str, np.ndarray]:
  """Returns questions whose title is that of a passage, and the correct passages for each."""
  titles = collections.defaultdict(set)
  for number, title in enumerate(table.titles):
    titles[metrics.normalize_answer(title)].add(number)
  rows = []
  for at, path in enumerate(paths):
    rows += [(at, row) for row in question_sets.of_titles(path, titles)]
  answers = [
    tuple(sorted(set(map(metrics.normalize_answer, row["answer"])) - {""})) for _, row in rows
  ]
  lists = {wanted: i for i, wanted in enumerate(sorted(set(answers)))}
  holders = _holders_of(set(itertools.chain.from_iterable(lists)), table.texts)
  right = [sorted(set().union(*(holders[answer] for answer in wanted))) for wanted in lists]
  strict = [
    sorted(titles[metrics.normalize_answer(row["title"])].intersection(right[lists[wanted]]))
    for (_, row), wanted in zip(rows, answers, strict=True)
  ]
  texts = [row["question"] for _, row in rows]
  ids = tokenizer(texts).to_list()
  return {
    "question_ids": _flat(ids, np.uint16),
    "question_counts": _sizes(ids),
    "question_sets": np.array([at for at, _ in rows], np.uint8),
    "question_halves": np.array([question_sets.half_of(row["title"]) for _, row in rows], np.uint8),
    "question_answers": np.array([lists[wanted] for wanted in answers], np.int32),
    "answer_passages": _flat(right, np.int32),
    "answer_counts": _sizes(right, np.int32),
    "strict_passages": _flat(strict, np.int32),
    "strict_counts": _sizes(strict),
    "bm25": bm25.Bm25Searcher(table).search(texts, min(_DEPTH, len(table))).numbers,
  }


def _holders_of(phrases: Collection[str], texts: Sequence[str]) -> dict[str, list[int]]:
  """Finds the passages that hold each answer as a sequence of whole words.

  There is no limit on words or passages. Both are compared after `metrics.normalize_answer`.

  Args:
    phrases: normalised phrases, none empty.
    texts: texts of the passages.

  Returns:
    phrase → ascending passage numbers.
  """
  sizes = collections.defaultdict(set)  # first word → numbers of words of the phrases with it
  for phrase in phrases:
    words = phrase.split()
    sizes[words[0]].add(len(words))
  found: dict[str, list[int]] = {phrase: [] for phrase in phrases}
  for number, text in enumerate(texts):
    words = metrics.normalize_answer(text).split()
    here = {
      phrase
      for at, word in enumerate(words)
      if word in sizes
      for size in sizes[word]
      if (phrase := " ".join(words[at : at + size])) in found
    }
    for phrase in here:
      found[phrase].append(number)
  return found


# ------------------------------------------------------------------------------------------ encoder


def _encoder(path: str) -> tuple[dict, dict[str, np.ndarray]]:
  """Returns the architecture and weights of a published BERT, without unused weights."""
  if not path:
    return {}, {}
  bert = published_models.load_bert(path).model
  weights = {
    weight.path: np.asarray(weight, np.float32)
    for weight in bert.encoder.weights
    if "pooled_dense" not in weight.path
  }
  return dict(bert.get_config()["architecture"]), weights

"""A corpus with its clozes and questions in one small file that needs only NumPy to read."""

import dataclasses
import json
import zipfile

import numpy as np

NONE = -1  # no phrase, no passage
HALVES = ("dev", "test")


@dataclasses.dataclass(frozen=True)
class Packed:
  """All data that the stages need.

  Dimensions: V word pieces, N passages, S sentences, C clozes, P phrases, Q questions. Lists of
  different lengths are concatenated.

  Attributes:
    facts: vocabulary_size, the ids cls, sep and mask, length (of packed passages), and the names of
      the question sets.
    continues: [V] bool, which word pieces continue a word.
    title_ids, title_counts: word pieces of each distinct title, cut as in a packed passage; how
      many each has.
    passage_titles: [N] which title each passage has.
    text_ids, text_counts: word pieces of each passage's text, cut as in a packed passage; how many
      each has.
    sentence_starts, sentence_counts: first word piece of each sentence in its passage's text; how
      many each passage has.
    cloze_sentences: [C] number of the sentence of each cloze.
    span_starts, span_ends, span_counts: word pieces [start, end) of each salient span in the
      sentence; how many each cloze has.
    span_phrases: phrase of each span, if 1 to 20 other passages hold it and it is not in the title;
      else NONE.
    phrase_passages, phrase_counts: the passages that hold each phrase, ascending; how many.
    question_ids, question_counts: word pieces of each question; how many.
    question_sets, question_halves: [Q] the set; 0 for dev, 1 for test, by title.
    question_answers: [Q] number of the list of answers.
    answer_passages, answer_counts: the passages that hold one of a list's answers, ascending; how
      many.
    strict_passages, strict_counts: for each question, those of them that have its title; how many.
    bm25: [Q, 20] passages found by BM25, best first.
    architecture: architecture of the published encoder; empty if there is none.
    encoder: its weights by path, float32; in the file matrices are rounded to bfloat16, since mixed
      precision rounds them anyway.
  """

  facts: dict
  continues: np.ndarray
  title_ids: np.ndarray
  title_counts: np.ndarray
  passage_titles: np.ndarray
  text_ids: np.ndarray
  text_counts: np.ndarray
  sentence_starts: np.ndarray
  sentence_counts: np.ndarray
  cloze_sentences: np.ndarray
  span_starts: np.ndarray
  span_ends: np.ndarray
  span_counts: np.ndarray
  span_phrases: np.ndarray
  phrase_passages: np.ndarray
  phrase_counts: np.ndarray
  question_ids: np.ndarray
  question_counts: np.ndarray
  question_sets: np.ndarray
  question_halves: np.ndarray
  question_answers: np.ndarray
  answer_passages: np.ndarray
  answer_counts: np.ndarray
  strict_passages: np.ndarray
  strict_counts: np.ndarray
  bm25: np.ndarray
  architecture: dict = dataclasses.field(default_factory=dict)
  encoder: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

  def save(self, path: str) -> None:
    """Writes a zip file, compressed with LZMA."""
    arrays = {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
      if field.type is np.ndarray
    }
    arrays |= {
      f"encoder/{name}": _to_bfloat16(weight) if weight.ndim > 1 else weight
      for name, weight in self.encoder.items()
    }
    header = {
      "facts": self.facts,
      "architecture": self.architecture,
      "arrays": {name: [array.dtype.str, array.shape] for name, array in arrays.items()},
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as file:
      file.writestr("header.json", json.dumps(header))
      for name, array in arrays.items():
        file.writestr(name, _planes(array).tobytes())

  @classmethod
  def load(cls, path: str) -> "Packed":
    """Reads a file written by `save`."""
    with zipfile.ZipFile(path) as file:
      header = json.loads(file.read("header.json"))
      arrays = {
        name: _from_planes(file.read(name), np.dtype(dtype)).reshape(shape)
        for name, (dtype, shape) in header["arrays"].items()
      }
    encoder = {
      name.removeprefix("encoder/"): _from_bfloat16(arrays.pop(name))
      for name in list(arrays)
      if name.startswith("encoder/")
    }
    return cls(
      facts=header["facts"], architecture=header["architecture"], encoder=encoder, **arrays
    )


def _planes(array: np.ndarray) -> np.ndarray:
  """Returns all first bytes, then all second ones, ..; they compress better separately."""
  return np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(-1, array.dtype.itemsize).T


def _from_planes(data: bytes, dtype: np.dtype) -> np.ndarray:
  planes = np.frombuffer(data, np.uint8).reshape(dtype.itemsize, -1)
  return np.ascontiguousarray(planes.T).reshape(-1).view(dtype)


def _to_bfloat16(array: np.ndarray) -> np.ndarray:
  """Returns the nearest bfloat16 numbers as 16-bit integers; they compress better than float16."""
  bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
  return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def _from_bfloat16(array: np.ndarray) -> np.ndarray:
  """Converts arrays of `_to_bfloat16` back; other arrays are returned unchanged."""
  return (array.astype(np.uint32) << 16).view(np.float32) if array.dtype == np.uint16 else array


def firsts(counts: np.ndarray) -> np.ndarray:
  """Returns where each row begins, and where the last one ends: [n + 1] int64."""
  return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def padded(values: np.ndarray, counts: np.ndarray, width: int, fill: int) -> np.ndarray:
  """Returns rows of different lengths as [n, width], cut or padded."""
  at, column = firsts(counts)[:-1, None], np.arange(width)[None]
  inside = column < counts[:, None]
  return np.where(inside, values[np.where(inside, at + column, 0)] if len(values) else fill, fill)

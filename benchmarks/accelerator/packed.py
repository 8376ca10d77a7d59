"""A corpus with its clozes and questions in one small file that NumPy alone can read."""

import dataclasses
import json
import zipfile

import numpy as np

NONE = -1  # no phrase, no passage
HALVES = ("dev", "test")


@dataclasses.dataclass(frozen=True)
class Packed:
  """Everything that the stages need.

  V word pieces, N passages, S sentences, C clozes, P phrases, Q questions. Rows of lists stand one
  after another.

  Attributes:
    facts: vocabulary_size, the ids cls, sep and mask, length (of packed passages), and the names of
      the question sets.
    continues: [V] bool, which word pieces go on inside a word.
    title_ids, title_counts: word pieces of each different title, cut as in a packed passage; how
      many each has.
    passage_titles: [N] which title.
    text_ids, text_counts: word pieces of each passage's text, cut as in a packed passage; how many
      each has.
    sentence_starts, sentence_counts: first word piece of each sentence in its passage's text; how
      many each passage has.
    cloze_sentences: [C] number of the sentence that the cloze is.
    span_starts, span_ends, span_counts: word pieces [start, end) in the sentence of each salient
      span; how many each cloze has.
    span_phrases: of each span, which phrase it is, if that is held by 1 to 20 other passages and
      does not stand in the title; else NONE.
    phrase_passages, phrase_counts: the passages that hold each phrase, ascending; how many.
    question_ids, question_counts: word pieces of each question; how many.
    question_sets, question_halves: [Q] which of the sets; 0 dev, 1 test, by title.
    question_answers: [Q] which list of answers.
    answer_passages, answer_counts: the passages that hold one of a list's answers, ascending; how
      many.
    strict_passages, strict_counts: of each question, those of them that have its title; how many.
    bm25: [Q, 20] passages that BM25 finds, best first.
    architecture: of the published encoder; empty where there is none.
    encoder: its weights by path, float32; matrices are rounded to bfloat16 in the file, as mixed
      precision reads them anyway.
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
    """Writes one zip file, compressed by LZMA."""
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
    """Reads what `save` wrote."""
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
  """All first bytes, then all second ones, ..: they compress better apart."""
  return np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(-1, array.dtype.itemsize).T


def _from_planes(data: bytes, dtype: np.dtype) -> np.ndarray:
  planes = np.frombuffer(data, np.uint8).reshape(dtype.itemsize, -1)
  return np.ascontiguousarray(planes.T).reshape(-1).view(dtype)


def _to_bfloat16(array: np.ndarray) -> np.ndarray:
  """The nearest bfloat16 numbers, as 16-bit integers: they compress better than float16."""
  bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
  return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def _from_bfloat16(array: np.ndarray) -> np.ndarray:
  """What `_to_bfloat16` rounded; other arrays are left alone."""
  return (array.astype(np.uint32) << 16).view(np.float32) if array.dtype == np.uint16 else array


def firsts(counts: np.ndarray) -> np.ndarray:
  """Where each row begins, and where the last one ends: [n + 1] int64."""
  return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def padded(values: np.ndarray, counts: np.ndarray, width: int, fill: int) -> np.ndarray:
  """Rows of different lengths as [n, width], cut or filled up."""
  at, column = firsts(counts)[:-1, None], np.arange(width)[None]
  inside = column < counts[:, None]
  return np.where(inside, values[np.where(inside, at + column, 0)] if len(values) else fill, fill)

"""Text to word-piece ids and back to the original text.

One tokenizer for jobs, trainers and the exported graph: TF Text's FastBertTokenizer, whose offsets point into the original
bytes, so that an answer is always a substring of the passage as it was written.
"""

import dataclasses
import os
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import tensorflow as tf
import tensorflow_text as tf_text

from realm_tf import artifacts

VOCAB = "vocab.txt"
PAD, UNK, CLS, SEP, MASK = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class VocabularyError(artifacts.UserError):
  """A vocab.txt that cannot serve a BERT model."""


@dataclasses.dataclass(frozen=True)
class Tokens:
  """Word pieces of a batch of texts.

  Attributes:
    ids: [N, None] int32 ragged.
    starts: [N, None] int32 ragged, byte offsets into the UTF-8 text.
    ends: [N, None] int32 ragged, byte offsets, exclusive.
  """

  ids: tf.RaggedTensor
  starts: tf.RaggedTensor
  ends: tf.RaggedTensor


class Tokenizer:
  """BERT word pieces over a vocab.txt.

  Args:
    vocab: path of a vocab.txt, or of a folder that holds one.
    lower_case: lower-case and strip accents before looking up word pieces (BERT's uncased models).

  Raises:
    VocabularyError: the file is missing, has repeated lines, or lacks a special token; [PAD] must be its first line, as in
      every released BERT, because padding is recognised by id 0.
  """

  def __init__(self, vocab: str, *, lower_case: bool = True):
    self.path = os.path.join(vocab, VOCAB) if artifacts.gfile.isdir(vocab) else vocab
    if not artifacts.gfile.exists(self.path):
      raise VocabularyError(f"no vocabulary at {self.path!r}; give a BERT vocab.txt or a folder that holds one.")
    self.lower_case = lower_case
    self.pieces = artifacts.read_text(self.path).rstrip("\n").split("\n")
    self._check()
    self.size = len(self.pieces)
    ids = {piece: i for i, piece in enumerate(self.pieces)}
    self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (ids[piece] for piece in SPECIAL)
    self.continues = np.array([piece.startswith("##") for piece in self.pieces])  # [V]: goes on inside a word
    self._op = tf_text.FastBertTokenizer(
        vocab=self.pieces, token_out_type=tf.int32, unknown_token=UNK, lower_case_nfd_strip_accents=lower_case)

  def _check(self) -> None:
    missing = [piece for piece in SPECIAL if piece not in self.pieces]
    if missing:
      raise VocabularyError(f"{self.path!r} lacks {', '.join(missing)}; a BERT vocabulary has all of {', '.join(SPECIAL)}.")
    if self.pieces[0] != PAD:
      raise VocabularyError(f"{self.path!r} begins with {self.pieces[0]!r}, wanted {PAD}: move it to the first line.")
    repeated = [piece for piece, count in Counter(self.pieces).items() if count > 1]
    if repeated:
      raise VocabularyError(f"{self.path!r} holds {repeated[0]!r} more than once; every line must be its own word piece.")

  @property
  def fingerprint(self) -> str:
    return artifacts.fingerprint_of(self.pieces, self.lower_case)

  def __call__(self, texts) -> tf.RaggedTensor:
    """Texts ([N] string) to word-piece ids ([N, None] int32 ragged); usable inside a graph."""
    return self._op.tokenize(texts).merge_dims(1, -1)

  def with_offsets(self, texts) -> Tokens:
    """Texts ([N] string) to word pieces with byte offsets into the original; usable inside a graph."""
    ids, starts, ends = self._op.tokenize_with_offsets(texts)
    return Tokens(*(tf.cast(part.merge_dims(1, -1), tf.int32) for part in (ids, starts, ends)))

  def spell(self, ids: Iterable[int]) -> str:
    """The words of word pieces, as the vocabulary writes them."""
    return " ".join(self.pieces[piece] for piece in ids).replace(" ##", "")

  def lengths(self, texts: Sequence[str]) -> np.ndarray:
    """Number of word pieces of each text: [N] int64."""
    return self(tf.constant(texts, tf.string)).row_lengths().numpy() if len(texts) else np.zeros([0], np.int64)


def write_vocabulary(folder: str, pieces: Iterable[str]) -> None:
  """Writes a folder's vocab.txt."""
  artifacts.write_text(os.path.join(folder, VOCAB), "\n".join(pieces) + "\n")


def train_vocabulary(texts: Iterable[str], *, size: int, lower_case: bool = True, min_count: int = 2) -> list[str]:
  """Learns a BERT vocabulary from texts with the `tokenizers` library's word-piece trainer.

  Args:
    texts: a sample of the corpus; held in memory.
    size: most word pieces, special tokens included.
    lower_case: as the `Tokenizer` will be used.
    min_count: pieces seen less often are left out.

  Returns:
    The lines of vocab.txt, `[PAD]` first; the same in every run with the same texts.
  """
  from tokenizers import BertWordPieceTokenizer  # only where a vocabulary is learned

  trainer, texts = BertWordPieceTokenizer(lowercase=lower_case, strip_accents=lower_case), list(texts)
  alphabet = _alphabet((trainer.normalize(text) for text in texts), most=min(1000, (size - len(SPECIAL)) // 4))
  # The trainer numbers `##a`, `##b`, .. in the order of a random hash table and breaks ties by number: given first, as
  # special tokens, their order is ours and the vocabulary is the same in every run.
  first = [*SPECIAL, *alphabet, *(f"##{letter}" for letter in alphabet)]
  trainer.train_from_iterator(
      texts, vocab_size=size, min_frequency=min_count, special_tokens=first, limit_alphabet=len(alphabet), show_progress=False)
  return [piece for piece, _ in sorted(trainer.get_vocab().items(), key=lambda item: item[1])]


def _alphabet(texts: Iterable[str], *, most: int) -> list[str]:
  """At most `most` characters, sorted: the frequent ones, cut where the next is rarer, so that no tie is broken by chance."""
  counts = Counter()
  for text in texts:
    counts.update(text)
  counts = {letter: count for letter, count in counts.items() if not letter.isspace()}
  next_count = sorted(counts.values(), reverse=True)[most] if len(counts) > most else 0
  return sorted(letter for letter, count in counts.items() if count > next_count)

"""Converts text to word-piece ids and back to the original text.

Jobs, trainers and the exported graph share one tokenizer: BERT's, in TensorFlow and TF Text ops.
Its offsets point into the original bytes, so that an answer is always a substring of the passage as
it was written.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf
import tensorflow_text as tf_text

from realm_tf.corpus import characters, vocabularies
from realm_tf.corpus.characters import WordRules
from realm_tf.corpus.vocabularies import SPECIAL, UNK, Vocabulary

_MAX_PIECE_BYTES = 256  # limit of the TF Text op
_NO_LIMIT = 2**31 - 1
_LETTERS, _COVERED = 1000, 0.9995  # of a learned vocabulary


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


class _Words(NamedTuple):
  """The words of N texts, and the origin of each of their bytes.

  Attributes:
    words: [W] string, spelt as in the vocabulary.
    rows: [W] int64, the text of each word.
    first_byte: [W] int32, offset of each word in the concatenated bytes of all words.
    starts, ends: [bytes of all words] int32, byte offsets of each byte's character in its text; a
      stripped mark belongs to the letter before it.
  """

  words: tf.Tensor
  rows: tf.Tensor
  first_byte: tf.Tensor
  starts: tf.Tensor
  ends: tf.Tensor


class Tokenizer:
  """BERT word pieces over a vocabulary.

  Args:
    vocab: a `Vocabulary`, or the path of a vocab.txt or of a folder that holds one; see
      `vocabularies.read`.
    rules: rules that split a text into words; replace those of the vocabulary's folder.

  Raises:
    VocabularyError: if there is no vocabulary, or it is not a BERT vocabulary.
  """

  def __init__(self, vocab: str | Vocabulary, rules: WordRules | None = None):
    vocabulary = vocabularies.read(vocab) if isinstance(vocab, str) else vocab
    if rules:
      vocabulary = dataclasses.replace(vocabulary, rules=rules)
    self.vocabulary, self.path, self.pieces, self.rules = (
      vocabulary,
      vocabulary.path,
      vocabulary.pieces,
      vocabulary.rules,
    )
    self.size = len(self.pieces)
    ids = {piece: i for i, piece in enumerate(self.pieces)}
    self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (
      ids[piece] for piece in SPECIAL
    )
    self.continues = np.array(
      [_continues(piece) for piece in self.pieces]
    )  # [V]: whether the piece continues a word
    fitting = [
      piece if len(piece.encode()) <= _MAX_PIECE_BYTES else vocabularies.unused(i)
      for i, piece in enumerate(self.pieces)
    ]
    with tf.init_scope():
      self._op = tf_text.FastWordpieceTokenizer(
        vocab=fitting,
        token_out_type=tf.int32,
        unknown_token=UNK,
        no_pretokenization=True,
        max_bytes_per_word=_NO_LIMIT,
      )
      self._table = characters.Table(
        *(tf.constant(part) for part in dataclasses.astuple(characters.table(self.rules)))
      )

  @property
  def fingerprint(self) -> str:
    return self.vocabulary.fingerprint

  @property
  def details(self) -> dict:
    """The tokenizer's entries in the info.json of an artifact made with it."""
    return {
      "vocab_size": self.size,
      "vocab_fingerprint": self.fingerprint,
      "tokenizer": dataclasses.asdict(self.rules),
    }

  def __call__(self, texts) -> tf.RaggedTensor:
    """Converts texts ([N] string) to ids ([N, None] int32 ragged); usable inside a graph."""
    words = self._words(texts)
    ids = self._op.tokenize(words.words)
    return _by_text(ids, words, tf.shape(texts)[0])(ids.values)

  def of_lists(self, lists: Sequence[Sequence[str]]) -> list[list[list[int]]]:
    """Converts lists of texts, of any lengths, to the ids of each text."""
    flat = tf.constant(list(itertools.chain(*lists)), tf.string)
    ids = iter(self(flat).to_list())
    return [list(itertools.islice(ids, len(texts))) for texts in lists]

  def with_offsets(self, texts) -> Tokens:
    """Converts texts ([N] string) to word pieces with offsets; usable inside a graph.

    Byte offsets point into the original texts. No piece is empty: all pieces of one character, such
    as a Hangul syllable, have the bytes of that character.
    """
    words = self._words(texts)
    ids, starts, ends = self._op.tokenize_with_offsets(words.words)
    first_byte = tf.gather(words.first_byte, ids.value_rowids())
    by_text = _by_text(ids, words, tf.shape(texts)[0])
    return Tokens(
      by_text(ids.values),
      by_text(tf.gather(words.starts, first_byte + tf.cast(starts.values, tf.int32))),
      by_text(tf.gather(words.ends, first_byte + tf.cast(ends.values, tf.int32) - 1)),
    )

  def _words(self, texts) -> _Words:
    """Runs BERT's basic tokenizer on all characters of all texts at once."""
    # With the line break, every character has a successor, and no word continues in the next text.
    codes, starts = tf.strings.unicode_decode_with_offsets(tf.strings.join([texts, "\n"]), "UTF-8")
    rows, codes, starts = (
      codes.value_rowids(),
      tf.minimum(codes.values, characters.END),
      tf.cast(starts.values, tf.int32),
    )
    kinds = tf.gather(self._table.kinds, codes)
    rows, codes, starts, kinds = _where(kinds != characters.MARK, rows, codes, starts, kinds)
    ends = tf.concat([starts, [0]], axis=0)[1:]  # past the character's marks
    rows, codes, starts, ends, kinds = _where(
      kinds != characters.DROPPED, rows, codes, starts, ends, kinds
    )

    joins = kinds == characters.LETTER
    begins = ~(joins & tf.concat([[False], joins], axis=0)[:-1])
    rows, codes, starts, ends, begins = _where(
      kinds != characters.SPACE, rows, codes, starts, ends, begins
    )
    at = tf.range(tf.size(codes))
    place = at - tf.gather(_where(begins, at)[0], tf.cumsum(tf.cast(begins, tf.int32)) - 1)
    # the character at which each word begins
    (first,) = _where(place % self.rules.max_word_chars == 0, at)

    letters, of_letter = self._spell(codes)
    # row splits of the letters by word
    splits = tf.concat([tf.searchsorted(of_letter, first), [tf.size(letters)]], axis=0)
    words = tf.strings.unicode_encode(
      tf.RaggedTensor.from_row_splits(letters, splits, validate=False), "UTF-8"
    )
    num_bytes = 1 + sum(tf.cast(letters >= longer, tf.int32) for longer in (0x80, 0x800, 0x10000))
    of_byte = tf.gather(of_letter, _repeated(num_bytes))
    return _Words(
      words,
      tf.gather(rows, first),
      tf.cumsum(tf.strings.length(words), exclusive=True),
      tf.gather(starts, of_byte),
      tf.gather(ends, of_byte),
    )

  def _spell(self, codes: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the letters that replace characters, and the index of each letter's character."""
    count = tf.cast(tf.gather(self._table.count, codes), tf.int32)
    of_letter = _repeated(count)
    place = tf.range(tf.size(of_letter)) - tf.gather(tf.cumsum(count, exclusive=True), of_letter)
    return tf.gather(
      self._table.letters, tf.gather(tf.gather(self._table.first, codes), of_letter) + place
    ), of_letter

  def spell(self, ids: Iterable[int]) -> str:
    """Joins word pieces to words, spelt as in the vocabulary."""
    return " ".join(self.pieces[piece] for piece in ids).replace(" ##", "")

  def lengths(self, texts: Sequence[str]) -> np.ndarray:
    """Returns the number of word pieces of each text: [N] int64."""
    return (
      self(tf.constant(texts, tf.string)).row_lengths().numpy()
      if len(texts)
      else np.zeros([0], np.int64)
    )


def _continues(piece: str) -> bool:
  """Returns whether no word can begin with it; in a script without spaces, one can."""
  return piece.startswith("##") and not (len(piece) > 2 and characters.is_unspaced(piece[2]))


def _where(keep: tf.Tensor, *columns: tf.Tensor) -> list[tf.Tensor]:
  at = tf.where(keep)[:, 0]
  return [tf.gather(column, at) for column in columns]


def _repeated(counts: tf.Tensor) -> tf.Tensor:
  """Repeats each row index i `counts[i]` times (tf.repeat is fifty ops)."""
  ends = tf.cumsum(counts)
  return tf.searchsorted(ends, tf.range(tf.reduce_sum(counts)), side="right")


def _by_text(pieces: tf.RaggedTensor, words: _Words, num_texts: tf.Tensor):
  """Returns a function that regroups word-piece values from words [W, None] to texts [N, None]."""
  rows = tf.gather(words.rows, pieces.value_rowids())
  return lambda values: tf.RaggedTensor.from_value_rowids(
    values, rows, nrows=tf.cast(num_texts, rows.dtype), validate=False
  )


_UNCASED = WordRules()  # the rules of BERT's uncased models


def train_vocabulary(
  texts: Iterable[str], *, size: int, rules: WordRules = _UNCASED, min_count: int = 2
) -> list[str]:
  """Learns a BERT vocabulary from texts with the `tokenizers` library's word-piece trainer.

  Args:
    texts: a sample of the corpus; held in memory.
    size: maximum number of word pieces, including special tokens.
    rules: rules of the `Tokenizer` that will use the vocabulary, so that both see the same words.
    min_count: pieces seen less often are left out.

  Returns:
    The lines of vocab.txt, `[PAD]` first. The result is deterministic.
  """
  import tokenizers  # needed only to learn a vocabulary

  texts = [" ".join(rules.words(text)) for text in texts]
  alphabet = _alphabet(texts, most=(size - len(SPECIAL)) // 4)
  # The trainer numbers `##a`, `##b`, .. in the order of a random hash table and breaks ties by
  # number. Passing them first, as special tokens, fixes their order and makes the vocabulary
  # deterministic.
  first = [
    *SPECIAL,
    *alphabet,
    *(f"##{letter}" for letter in alphabet if not rules.split_cjk or not characters.is_cjk(letter)),
  ]
  learner = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token=UNK))
  learner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  learner.train_from_iterator(
    texts,
    tokenizers.trainers.WordPieceTrainer(
      vocab_size=size,
      min_frequency=min_count,
      special_tokens=first,
      limit_alphabet=len(alphabet),
      show_progress=False,
    ),
  )
  return [piece for piece, _ in sorted(learner.get_vocab().items(), key=lambda item: item[1])]


def _alphabet(texts: Iterable[str], *, most: int) -> list[str]:
  """Returns the most frequent letters, sorted.

  They are 1,000, or as many as cover 99.95% of the text if that is more, but at most `most`.
  Ties are broken deterministically.
  """
  counts: Counter[str] = Counter()
  for text in texts:
    counts.update(text)
  del counts[" "]
  ordered = sorted(counts.values(), reverse=True)
  needed = int(np.searchsorted(np.cumsum(ordered), _COVERED * sum(ordered))) + 1
  kept = min(max(needed, _LETTERS), most, len(ordered))
  if not kept:
    return []
  least = ordered[kept - 1]
  if sum(count >= least for count in ordered) > most:
    least += 1
  return sorted(letter for letter, count in counts.items() if count >= least)

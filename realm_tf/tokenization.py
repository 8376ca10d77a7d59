"""Text to word-piece ids and back to the original text.

One tokenizer for jobs, trainers and the exported graph: BERT's, in TensorFlow's and TF Text's ops.
Its offsets point into the original bytes, so that an answer is always a substring of the passage as
it was written.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf
import tensorflow_text as tf_text

from realm_tf import characters, vocabularies
from realm_tf.characters import WordRules
from realm_tf.vocabularies import (  # noqa: F401
  MASK,
  SPECIAL,
  UNK,
  VOCAB,
  Vocabulary,
  VocabularyError,
)

_MAX_PIECE_BYTES = 256  # of TF Text's op
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
  """The words of N texts, and where each of their bytes is from.

  Attributes:
    words: [W] string, as the vocabulary spells them.
    rows: [W] int64, the text of each word.
    first_byte: [W] int32, where a word begins among the bytes of all words.
    starts, ends: [bytes of all words] int32, byte offsets of each byte's character in its text; a
      mark that was stripped counts to the letter before it.
  """

  words: tf.Tensor
  rows: tf.Tensor
  first_byte: tf.Tensor
  starts: tf.Tensor
  ends: tf.Tensor


class Tokenizer:
  """BERT word pieces over a vocabulary.

  Args:
    vocab: a `Vocabulary`; or the path of a vocab.txt, or of a folder that holds one, see
      `vocabularies.read`.
    rules: how a text becomes words, instead of what the vocabulary's folder says.

  Raises:
    VocabularyError: no vocabulary, or not one of BERT's kind.
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
    )  # [V]: goes on inside a word
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
    """What the info.json of an artifact says of the tokenizer that it was made with."""
    return {
      "vocab_size": self.size,
      "vocab_fingerprint": self.fingerprint,
      "tokenizer": dataclasses.asdict(self.rules),
    }

  def __call__(self, texts) -> tf.RaggedTensor:
    """Texts ([N] string) to word-piece ids ([N, None] int32 ragged); usable inside a graph."""
    words = self._words(texts)
    ids = self._op.tokenize(words.words)
    return _by_text(ids, words, tf.shape(texts)[0])(ids.values)

  def with_offsets(self, texts) -> Tokens:
    """Texts ([N] string) to word pieces with byte offsets into the original; usable inside a graph.

    No piece is empty: all pieces of one character, as of a Hangul syllable, have the bytes of that
    character.
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
    """BERT's basic tokenizer on all characters of all texts at once."""
    # The line break gives every character one after it, so that no word goes on in the next text.
    codes, starts = tf.strings.unicode_decode_with_offsets(tf.strings.join([texts, "\n"]), "UTF-8")
    rows, codes, starts = (
      codes.value_rowids(),
      tf.minimum(codes.values, characters.END),
      tf.cast(starts.values, tf.int32),
    )
    kinds = tf.gather(self._table.kinds, codes)
    rows, codes, starts, kinds = _where(kinds != characters.MARK, rows, codes, starts, kinds)
    ends = tf.concat([starts, [0]], axis=0)[1:]  # past the marks on it
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
    (first,) = _where(
      place % self.rules.max_word_chars == 0, at
    )  # character that each word begins with

    letters, of_letter = self._spell(codes)
    splits = tf.concat(
      [tf.searchsorted(of_letter, first), [tf.size(letters)]], axis=0
    )  # of the letters, by word
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
    """The letters that stand for characters, and the number of the character that each is of."""
    count = tf.cast(tf.gather(self._table.count, codes), tf.int32)
    of_letter = _repeated(count)
    place = tf.range(tf.size(of_letter)) - tf.gather(tf.cumsum(count, exclusive=True), of_letter)
    return tf.gather(
      self._table.letters, tf.gather(tf.gather(self._table.first, codes), of_letter) + place
    ), of_letter

  def spell(self, ids: Iterable[int]) -> str:
    """The words of word pieces, as the vocabulary writes them."""
    return " ".join(self.pieces[piece] for piece in ids).replace(" ##", "")

  def lengths(self, texts: Sequence[str]) -> np.ndarray:
    """Number of word pieces of each text: [N] int64."""
    return (
      self(tf.constant(texts, tf.string)).row_lengths().numpy()
      if len(texts)
      else np.zeros([0], np.int64)
    )


def _continues(piece: str) -> bool:
  """Whether no word begins with it: in a script without spaces one may."""
  return piece.startswith("##") and not (len(piece) > 2 and characters.is_unspaced(piece[2]))


def _where(keep: tf.Tensor, *columns: tf.Tensor) -> list[tf.Tensor]:
  at = tf.where(keep)[:, 0]
  return [tf.gather(column, at) for column in columns]


def _repeated(counts: tf.Tensor) -> tf.Tensor:
  """Row i as often as `counts[i]` says (tf.repeat is fifty ops)."""
  ends = tf.cumsum(counts)
  return tf.searchsorted(ends, tf.range(tf.reduce_sum(counts)), side="right")


def _by_text(pieces: tf.RaggedTensor, words: _Words, num_texts: tf.Tensor):
  """Puts values of the word pieces [W, None] of words into rows by text [N, None]."""
  rows = tf.gather(words.rows, pieces.value_rowids())
  return lambda values: tf.RaggedTensor.from_value_rowids(
    values, rows, nrows=tf.cast(num_texts, rows.dtype), validate=False
  )


def train_vocabulary(
  texts: Iterable[str], *, size: int, rules: WordRules = WordRules(), min_count: int = 2
) -> list[str]:
  """Learns a BERT vocabulary from texts with the `tokenizers` library's word-piece trainer.

  Args:
    texts: a sample of the corpus; held in memory.
    size: most word pieces, special tokens included.
    rules: those that the `Tokenizer` will have; it makes the same words of the same texts.
    min_count: pieces seen less often are left out.

  Returns:
    The lines of vocab.txt, `[PAD]` first; the same in every run with the same texts.
  """
  import tokenizers  # only where a vocabulary is learned

  texts = [" ".join(rules.words(text)) for text in texts]
  alphabet = _alphabet(texts, most=(size - len(SPECIAL)) // 4)
  # The trainer numbers `##a`, `##b`, .. in the order of a random hash table and breaks ties by
  # number: given first, as special tokens, their order is ours and the vocabulary is the same in
  # every run.
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
  """The frequent letters, sorted: 1,000 or what 99.95% of the text needs, but at most `most`.

  No tie is broken by chance.
  """
  counts = Counter()
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

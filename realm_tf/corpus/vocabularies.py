"""Vocabularies with the rules of their tokenizers: this project's, Hugging Face's or Google's.

Rules are read from info.json in an artifact, and from tokenizer.json and tokenizer_config.json in a
Hugging Face folder. If no rules are found, a vocabulary with upper-case pieces counts as cased. All
options of BERT word-piece tokenizers are supported; any other tokenizer is rejected.
"""

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping, Sequence

from realm_tf.corpus.characters import WordRules
from realm_tf.storage import artifacts, json_files, json_lines
from realm_tf.storage.artifacts import gfile

VOCAB = "vocab.txt"
PAD, UNK, CLS, SEP, MASK = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
TOKENIZER, _CONFIG, _ADDED, _SPECIAL_MAP = (
  "tokenizer.json",
  "tokenizer_config.json",
  "added_tokens.json",
  "special_tokens_map.json",
)
MAX_PIECES = 4_000_000  # several times the largest published vocabulary
_MAX_BYTES = 100_000_000  # of a vocab.txt
_MAX_WORD_CHARS = 10_000
_SHOWN_CHARS = 80  # of a value in a message
_PREFIX = "##"
_PADDED_TO = 8  # word embeddings are often padded with spare rows to a multiple of 8, 64 or 128
ENCODERS = ("Transformer", "BERT")  # names in sentence-transformers
# tokenizer classes with BERT's word pieces
_CLASSES = (
  "Bert",
  "Realm",
  "DistilBert",
  "Electra",
  "MobileBert",
  "ConvBert",
  "SqueezeBert",
  "RetriBert",
  "DPRQuestionEncoder",
  "DPRContextEncoder",
  "DPRReader",
  "Lxmert",
  "LayoutLM",
  "PreTrained",
  "Tokenizers",
)


class VocabularyError(artifacts.UserError):
  """Raised for a vocabulary that cannot be used with a BERT model."""


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """Word pieces and the rules of their tokenizer.

  Attributes:
    pieces: word pieces by id; [PAD] is the first.
    rules: rules that split a text into words.
    path: path of the file that it was read from.
    pad_row: row of [PAD] in that file. [PAD] was swapped with the first piece; the rows of the
      embeddings must be swapped too.
  """

  pieces: tuple[str, ...]
  rules: WordRules
  path: str
  pad_row: int = 0

  @property
  def fingerprint(self) -> str:
    """Fingerprint of its pieces and rules."""
    return artifacts.fingerprint_of(self.pieces, dataclasses.asdict(self.rules))

  def with_case(self, lower_case: bool | None) -> "Vocabulary":
    """Returns the same vocabulary, lower-cased or not; None changes nothing."""
    if lower_case is None or lower_case == self.rules.lower_case:
      return self
    return dataclasses.replace(
      self, rules=dataclasses.replace(self.rules, lower_case=lower_case, strip_accents=lower_case)
    )

  @property
  def num_unused(self) -> int:
    """Number of pieces that occur in no text: spare rows, and empty or repeated lines."""
    return sum(piece == unused(row) for row, piece in enumerate(self.pieces))

  def with_rows(self, num_rows: int) -> "Vocabulary":
    """Adds unused pieces to match word embeddings that are padded to a multiple of 8 rows.

    Raises:
      VocabularyError: if there are fewer rows than pieces, or more without being padded.
    """
    if num_rows < len(self.pieces) or (num_rows > len(self.pieces) and num_rows % _PADDED_TO):
      raise VocabularyError(
        f"{self.path!r} has {len(self.pieces)} word pieces, but the checkpoint has {num_rows}; "
        "give the vocabulary that the checkpoint was trained with as --vocab."
      )
    spare = tuple(unused(row) for row in range(len(self.pieces), num_rows))
    return dataclasses.replace(self, pieces=self.pieces + spare)


def unused(row: int) -> str:
  """Returns a piece that occurs in no text."""
  return f"[unused row {row}]"


def read(path: str) -> Vocabulary:
  """Reads the vocabulary of a file or folder.

  Args:
    path: a vocab.txt or tokenizer.json; or a folder that holds one of them, an import's workdir, or
      a sentence-transformers folder.

  Raises:
    VocabularyError: if nothing is found, or if the tokenizer is not a BERT tokenizer; the message
      says why.
  """
  path = artifacts.latest(os.path.join(path, "snapshots")) or transformer_in(path)
  try:
    return _read(path)
  except (TypeError, LookupError, AttributeError, OverflowError) as error:
    raise VocabularyError(
      f"the tokenizer files at {path!r} are not in the layout of Hugging Face ({error!r}). "
      "Download them again, or give a vocab.txt that is alone in its folder."
    ) from error


def _read(path: str) -> Vocabulary:
  folder = path if gfile.isdir(path) else os.path.dirname(path)
  told = _json(os.path.join(folder, TOKENIZER))
  _check_tokenizer(told, os.path.join(folder, TOKENIZER))
  lines = os.path.join(folder, VOCAB) if folder == path else path
  if gfile.exists(lines) and os.path.basename(lines) != TOKENIZER:
    pieces = read_lines(lines)
    _check_same(pieces, told, lines)
  elif told:
    lines = os.path.join(folder, TOKENIZER)
    pieces = _by_id(told["model"]["vocab"], lines)
  else:
    raise VocabularyError(
      f"no vocabulary at {lines!r}; give a BERT vocab.txt or a folder that holds one."
    )
  added = _json(os.path.join(folder, _ADDED)) | {
    token["content"]: token["id"] for token in told.get("added_tokens", ())
  }
  info = _json(os.path.join(folder, artifacts.INFO))
  pieces = _with_added(pieces, added)
  rules = (
    _own_rules(info["tokenizer"]) if "tokenizer" in info else _published_rules(folder, told, pieces)
  )
  found = of(pieces, rules, path=lines)
  num_rows = (
    _json(os.path.join(folder, "config.json")) or _json(os.path.join(folder, "bert_config.json"))
  ).get("vocab_size") or 0
  if num_rows > MAX_PIECES:
    raise VocabularyError(f"{folder!r} says vocab_size={_shown(num_rows)}; at most {MAX_PIECES:,}.")
  return (
    found.with_rows(num_rows) if num_rows > len(pieces) and num_rows % _PADDED_TO == 0 else found
  )


def transformer_in(path: str) -> str:
  """Returns the Hugging Face folder inside a sentence-transformers folder; other paths unchanged.

  Raises:
    VocabularyError: if it does not have exactly one encoder.
  """
  kinds = modules_of(path)
  encoders = [folder for kind, folder in kinds if kind in ENCODERS]
  if kinds and len(encoders) != 1:
    raise VocabularyError(
      f"{path!r} consists of {', '.join(kind for kind, _ in kinds)}; "
      "wanted one Transformer and a Pooling."
    )
  return encoders[0] if encoders else path


def modules_of(path: str) -> list[tuple[str, str]]:
  """Returns kind and folder of each sentence-transformers module; [] for any other path."""
  modules_path = os.path.join(path, "modules.json")
  try:
    return [
      (module["type"].rsplit(".", 1)[-1], _inside(path, module["path"]))
      for module in json_files.read(modules_path, list, error=VocabularyError)
    ]
  except (VocabularyError, TypeError, LookupError, AttributeError) as error:
    raise VocabularyError(
      f"{modules_path!r} is not a list of modules ({error}). Download it again."
    ) from error


def _inside(folder: str, name: str) -> str:
  """Returns a folder inside another one; rejects paths outside of the model's folder."""
  if os.path.isabs(name) or ".." in name.split("/"):
    raise VocabularyError(f"{folder!r} has a module outside of it: {_shown(name)}.")
  return os.path.join(folder, name).rstrip("/")


def _shown(value) -> str:
  return repr(value)[:_SHOWN_CHARS]


def of(pieces: Sequence[str], rules: WordRules, *, path: str) -> Vocabulary:
  """Makes a vocabulary of pieces, given by id.

  For a repeated piece the last line counts, as in BERT. Earlier lines, and empty ones, become
  unused pieces.

  Raises:
    VocabularyError: if a special token is missing, if there are too many pieces, or if a piece
      cannot be a line of a text file.
  """
  ids = {piece: row for row, piece in enumerate(pieces) if piece}
  if len(pieces) > MAX_PIECES:
    raise VocabularyError(f"{path!r} has {len(pieces):,} word pieces; at most {MAX_PIECES:,}.")
  # vocab.txt has one piece per line, in UTF-8.
  if broken := [
    piece
    for piece in pieces
    if "\n" in piece or piece.endswith("\r") or not json_lines.is_writable(piece)
  ]:
    raise VocabularyError(f"{path!r} has the word piece {_shown(broken[0])}, which is not a line.")
  missing = [piece for piece in SPECIAL if piece not in ids]
  if missing:
    raise VocabularyError(
      f"{path!r} lacks {', '.join(missing)}; a BERT vocabulary has all of {', '.join(SPECIAL)}."
    )
  found = [piece if ids.get(piece) == row else unused(row) for row, piece in enumerate(pieces)]
  pad_row = ids[PAD]
  found[0], found[pad_row] = found[pad_row], found[0]
  return Vocabulary(tuple(found), rules, path, pad_row)


def write(folder: str, pieces: Iterable[str]) -> None:
  """Writes a folder's vocab.txt."""
  artifacts.write_text(os.path.join(folder, VOCAB), "\n".join(pieces) + "\n")


# ============================================================================================ files


def read_lines(path: str) -> list[str]:
  """Reads lines, which end only in \\n or \\r\\n: U+2028 may be a piece."""
  if gfile.isdir(path) or (size := gfile.stat(path).length) > _MAX_BYTES:
    what = "a folder" if gfile.isdir(path) else f"{size:,} bytes long"
    raise VocabularyError(f"{path!r} is {what}; wanted a file of at most {_MAX_BYTES:,} bytes.")
  with gfile.GFile(path, "rb") as file:
    data = file.read()
  if data.count(b"\n") > MAX_PIECES:
    raise VocabularyError(f"{path!r} has over {MAX_PIECES:,} lines; it is not a vocabulary.")
  try:
    lines = data.decode("utf-8-sig").rstrip("\r\n").split("\n")
  except UnicodeDecodeError as error:
    raise VocabularyError(
      f"{path!r} is not UTF-8 ({error}); a vocabulary is text with one word piece per line."
    ) from error
  return [line.removesuffix("\r") for line in lines]


def _check_same(pieces: Sequence[str], tokenizer: Mapping, path: str) -> None:
  """Rejects a vocab.txt that differs from the tokenizer.json beside it."""
  told = tokenizer["model"].get("vocab", {}) if tokenizer else {}
  for piece, row in told.items():
    if row < len(pieces) and pieces[row] != piece:
      raise VocabularyError(
        f"line {row + 1} of {path!r} is {pieces[row]!r}, but {TOKENIZER} beside it has {piece!r} "
        "there. Give the file that the model was trained with as --vocab, in a separate folder."
      )


def _json(path: str) -> dict:
  return json_files.read(path, dict, error=VocabularyError)


def _by_id(ids: Mapping[str, int], path: str) -> list[str]:
  if not all(type(row) is int for row in ids.values()):
    raise VocabularyError(f"{path!r} has word-piece ids that are not integers.")
  size = max(ids.values(), default=-1) + 1
  if size > 2 * len(ids) + 1000 or min(ids.values(), default=0) < 0:
    raise VocabularyError(
      f"{path!r} has {len(ids)} word pieces with ids up to {size - 1}; it is not a vocabulary."
    )
  pieces = [unused(row) for row in range(size)]
  for piece, row in ids.items():
    pieces[row] = piece
  return pieces


def _with_added(pieces: Sequence[str], added: Mapping[str, int]) -> list[str]:
  """Appends tokens that were added after the vocabulary was made."""
  extra = {piece: row for piece, row in added.items() if row >= len(pieces)}
  return (
    [*pieces, *_by_id({piece: row - len(pieces) for piece, row in extra.items()}, "added tokens")]
    if extra
    else list(pieces)
  )


# ============================================================================================ rules


def _published_rules(folder: str, tokenizer: Mapping, pieces: Sequence[str]) -> WordRules:
  """Returns the rules in Hugging Face's files.

  tokenizer_config.json takes precedence, then tokenizer.json, then BERT's own rules.
  """
  config_path = os.path.join(folder, _CONFIG)
  config = _json(config_path)
  _check_config(config, _json(os.path.join(folder, _SPECIAL_MAP)), config_path)
  sentences = _json(os.path.join(folder, "sentence_bert_config.json"))
  normalizer = tokenizer.get("normalizer") or (
    {"lowercase": False, "strip_accents": False, "handle_chinese_chars": False, "clean_text": False}
    if tokenizer
    else {}
  )

  def told(name: str, theirs: str, otherwise):
    return next(
      (
        values[key]
        for values, key in ((config, name), (normalizer, theirs))
        if values.get(key) is not None
      ),
      otherwise,
    )

  lower_case = told("do_lower_case", "lowercase", not _is_cased(pieces))
  strip_accents = told("strip_accents", "strip_accents", lower_case)
  return WordRules(
    lower_case=bool(lower_case or sentences.get("do_lower_case")),
    strip_accents=bool(strip_accents),
    split_cjk=bool(told("tokenize_chinese_chars", "handle_chinese_chars", True)),
    clean_text=bool(told("clean_text", "clean_text", True)),
    max_word_chars=_word_chars(
      tokenizer.get("model", {}).get("max_input_chars_per_word", WordRules.max_word_chars)
    ),
  )


def _own_rules(told: Mapping) -> WordRules:
  """Returns the rules in an artifact's info.json."""
  rules = WordRules(**told)
  kinds = {field.name: type(field.default) for field in dataclasses.fields(rules)}
  if not all(type(value) is kinds[name] for name, value in told.items()):
    raise TypeError("a tokenizer rule has the wrong type")
  return dataclasses.replace(rules, max_word_chars=_word_chars(rules.max_word_chars))


def _word_chars(value) -> int:
  """Checks the maximum number of characters of a word."""
  if type(value) is not int or not 0 < value <= _MAX_WORD_CHARS:
    raise VocabularyError(
      f"a tokenizer says max_input_chars_per_word={_shown(value)}; wanted 1 to {_MAX_WORD_CHARS}."
    )
  return value


def _is_cased(pieces: Sequence[str]) -> bool:
  words = [piece for piece in pieces if not re.fullmatch(r"\[.*\]|<.*>", piece)]
  # An uncased vocabulary has at most a few stray upper-case pieces.
  return sum(word != word.lower() for word in words) > len(words) / 200


def _check_tokenizer(tokenizer: Mapping, path: str) -> None:
  """Rejects a tokenizer.json that is not of a BERT tokenizer."""
  if not tokenizer:
    return
  model = tokenizer.get("model") or {}
  kind = model.get("type", "WordPiece" if "continuing_subword_prefix" in model else None)
  normalizer, splitter = (tokenizer.get(part) or {} for part in ("normalizer", "pre_tokenizer"))
  for what, got, wanted in (
    ("model", kind, ("WordPiece",)),
    ("prefix of pieces inside a word", model.get("continuing_subword_prefix", _PREFIX), (_PREFIX,)),
    ("unknown token", model.get("unk_token", UNK), (UNK,)),
    ("normalizer", normalizer.get("type"), ("BertNormalizer", None)),
    ("pre-tokenizer", splitter.get("type"), ("BertPreTokenizer",)),
  ):
    if got not in wanted:
      raise VocabularyError(
        f"{path!r} has the {what} {_shown(got)}; wanted {wanted[0]!r}, as in BERT tokenizers. "
        "Use a BERT-like model."
      )


def _check_config(config: Mapping, special: Mapping, path: str) -> None:
  """Rejects a tokenizer_config.json that is not of a BERT tokenizer."""
  name = config.get("tokenizer_class") or "BertTokenizer"
  if name.removesuffix("Fast").removesuffix("Tokenizer").removesuffix("Backend") not in _CLASSES:
    raise VocabularyError(
      f"{path!r} says {_shown(name)[1:-1]}; wanted a tokenizer with BERT's word pieces: "
      f"{', '.join(_CLASSES[:6])} or similar."
    )
  if config.get("do_basic_tokenize") is False:
    raise VocabularyError(
      f"{path!r} says do_basic_tokenize=false: its texts were split into words by another program."
    )
  if config.get("wordpieces_prefix", _PREFIX) != _PREFIX:
    raise VocabularyError(
      f"{path!r} marks pieces inside a word by {_shown(config['wordpieces_prefix'])}; "
      f"wanted {_PREFIX!r}."
    )
  for values in (special, config):
    for wanted, key in zip(
      SPECIAL, ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), strict=True
    ):
      got = values.get(key) or wanted
      got = got["content"] if isinstance(got, Mapping) else got
      if got != wanted:
        raise VocabularyError(
          f"the tokenizer of {path!r} has {key} {_shown(got)}; BERT's is {wanted!r}. "
          "Use a BERT-like model."
        )

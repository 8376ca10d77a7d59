"""A vocabulary with the rules of its tokenizer, from our files, Hugging Face's or Google's.

A folder of ours tells its rules in info.json, Hugging Face's in tokenizer.json and
tokenizer_config.json. Where nothing tells, a vocabulary with upper-case pieces is a cased one. What
a word-piece tokenizer of BERT's kind does is honoured, anything else is refused.
"""

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence

from realm_tf import artifacts
from realm_tf.artifacts import gfile
from realm_tf.characters import WordRules

VOCAB = "vocab.txt"
PAD, UNK, CLS, SEP, MASK = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
TOKENIZER, _CONFIG, _ADDED, _SPECIAL_MAP = (
  "tokenizer.json",
  "tokenizer_config.json",
  "added_tokens.json",
  "special_tokens_map.json",
)
_PREFIX = "##"
_PADDED_TO = 8  # word embeddings are often padded with spare rows to a multiple of 8, 64 or 128
ENCODERS = ("Transformer", "BERT")  # as sentence-transformers calls them
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
)  # with BERT's word pieces


class VocabularyError(artifacts.UserError):
  """A vocabulary that cannot serve a BERT model."""


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """Word pieces and the rules of their tokenizer.

  Attributes:
    pieces: by id; [PAD] is the first.
    rules: how a text becomes words.
    path: of the file that it is from.
    pad_row: where [PAD] stood in that file; it changed places with the first piece, as the rows of
      the embeddings must.
  """

  pieces: tuple[str, ...]
  rules: WordRules
  path: str
  pad_row: int = 0

  @property
  def fingerprint(self) -> str:
    """What it is known by: its pieces and its rules."""
    return artifacts.fingerprint_of(self.pieces, dataclasses.asdict(self.rules))

  def with_case(self, lower_case: bool | None) -> "Vocabulary":
    """The same, lower-cased or not; None changes nothing."""
    if lower_case is None or lower_case == self.rules.lower_case:
      return self
    return dataclasses.replace(
      self, rules=dataclasses.replace(self.rules, lower_case=lower_case, strip_accents=lower_case)
    )

  @property
  def num_unused(self) -> int:
    """Pieces that no text gives: rows to spare, empty and repeated lines."""
    return sum(piece == unused(row) for row, piece in enumerate(self.pieces))

  def with_rows(self, num_rows: int) -> "Vocabulary":
    """The same with a piece for every row of word embeddings that are padded to a multiple of 8.

    Raises:
      VocabularyError: fewer rows than pieces, or more without being padded.
    """
    if num_rows < len(self.pieces) or (num_rows > len(self.pieces) and num_rows % _PADDED_TO):
      raise VocabularyError(
        f"{self.path!r} has {len(self.pieces)} word pieces, the checkpoint {num_rows}; "
        "give the vocabulary that it was "
        "trained with as --vocab."
      )
    spare = tuple(unused(row) for row in range(len(self.pieces), num_rows))
    return dataclasses.replace(self, pieces=self.pieces + spare)


def unused(row: int) -> str:
  """A piece that no text gives."""
  return f"[unused row {row}]"


def read(path: str) -> Vocabulary:
  """The vocabulary of a file, or of a folder.

  Args:
    path: a vocab.txt or tokenizer.json; or a folder that holds one of them, an import's workdir, or
      a sentence-transformers folder.

  Raises:
    VocabularyError: nothing there, or not a tokenizer of BERT's kind; the message says why.
  """
  path = artifacts.latest(os.path.join(path, "snapshots")) or transformer_in(path)
  try:
    return _read(path)
  except (TypeError, LookupError, AttributeError) as error:
    raise VocabularyError(
      f"the tokenizer's files at {path!r} are not in the layout of Hugging Face ({error!r}). "
      "Download them again, or give a vocab.txt that lies alone in a folder."
    ) from error


def _read(path: str) -> Vocabulary:
  folder = path if gfile.isdir(path) else os.path.dirname(path)
  told = _json(os.path.join(folder, TOKENIZER))
  _check_tokenizer(told, os.path.join(folder, TOKENIZER))
  lines = os.path.join(folder, VOCAB) if folder == path else path
  if gfile.exists(lines) and os.path.basename(lines) != TOKENIZER:
    pieces = _read_lines(lines)
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
    WordRules(**info["tokenizer"])
    if "tokenizer" in info
    else _published_rules(folder, told, pieces)
  )
  found = of(pieces, rules, path=lines)
  num_rows = (
    _json(os.path.join(folder, "config.json")) or _json(os.path.join(folder, "bert_config.json"))
  ).get("vocab_size", 0)
  return (
    found.with_rows(num_rows) if num_rows > len(pieces) and num_rows % _PADDED_TO == 0 else found
  )


def transformer_in(path: str) -> str:
  """The Hugging Face folder inside a sentence-transformers folder; any other path as it is.

  Raises:
    VocabularyError: not one encoder.
  """
  kinds = modules_of(path)
  encoders = [folder for kind, folder in kinds if kind in ENCODERS]
  if kinds and len(encoders) != 1:
    raise VocabularyError(
      f"{path!r} is made of {', '.join(kind for kind, _ in kinds)}; "
      "wanted one Transformer and a Pooling."
    )
  return encoders[0] if encoders else path


def modules_of(path: str) -> list[tuple[str, str]]:
  """Kind and folder of each part of a sentence-transformers folder; none for any other path."""
  modules_path = os.path.join(path, "modules.json")
  if not gfile.exists(modules_path):
    return []
  try:
    return [
      (module["type"].rsplit(".", 1)[-1], os.path.join(path, module["path"]).rstrip("/"))
      for module in json.loads(artifacts.read_text(modules_path))
    ]
  except (ValueError, TypeError, LookupError, AttributeError) as error:
    raise VocabularyError(
      f"{modules_path!r} is no list of modules ({error!r}). Download it again."
    ) from error


def of(pieces: Sequence[str], rules: WordRules, *, path: str) -> Vocabulary:
  """A vocabulary of these pieces by id.

  A repeated piece is its last line, as in BERT; earlier lines, and empty ones, are pieces that no
  text has.

  Raises:
    VocabularyError: a special token is missing.
  """
  ids = {piece: row for row, piece in enumerate(pieces) if piece}
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


def _read_lines(path: str) -> list[str]:
  """Lines end in \\n or \\r\\n and nowhere else: U+2028 may be a piece."""
  with gfile.GFile(path, "rb") as file:
    data = file.read()
  try:
    lines = data.decode("utf-8-sig").rstrip("\r\n").split("\n")
  except UnicodeDecodeError as error:
    raise VocabularyError(
      f"{path!r} is not UTF-8 ({error}); a vocabulary is text, one word piece a line."
    ) from error
  return [line.removesuffix("\r") for line in lines]


def _check_same(pieces: Sequence[str], tokenizer: Mapping, path: str) -> None:
  """Refuses a vocab.txt beside a tokenizer.json that numbers its word pieces in another way."""
  told = tokenizer["model"].get("vocab", {}) if tokenizer else {}
  for piece, row in told.items():
    if row < len(pieces) and pieces[row] != piece:
      raise VocabularyError(
        f"line {row + 1} of {path!r} is {pieces[row]!r}, and {TOKENIZER} beside it has {piece!r} "
        "there. Give the file that the model was trained with as --vocab, in a folder of its own."
      )


def _json(path: str) -> dict:
  if not gfile.exists(path):
    return {}
  try:
    return dict(json.loads(artifacts.read_text(path)))
  except (ValueError, TypeError) as error:
    raise VocabularyError(f"{path!r} is not a JSON object: {error}. Download it again.") from error


def _by_id(ids: Mapping[str, int], path: str) -> list[str]:
  size = max(ids.values(), default=-1) + 1
  if size > 2 * len(ids) + 1000 or min(ids.values(), default=0) < 0:
    raise VocabularyError(
      f"{path!r} numbers {len(ids)} word pieces up to {size - 1}; that is no vocabulary."
    )
  pieces = [unused(row) for row in range(size)]
  for piece, row in ids.items():
    pieces[row] = piece
  return pieces


def _with_added(pieces: Sequence[str], added: Mapping[str, int]) -> list[str]:
  """Tokens that were added after the vocabulary was made take the rows behind it."""
  extra = {piece: row for piece, row in added.items() if row >= len(pieces)}
  return (
    [*pieces, *_by_id({piece: row - len(pieces) for piece, row in extra.items()}, "added tokens")]
    if extra
    else list(pieces)
  )


# ============================================================================================ rules


def _published_rules(folder: str, tokenizer: Mapping, pieces: Sequence[str]) -> WordRules:
  """What Hugging Face's files say.

  tokenizer_config.json comes first, then tokenizer.json, then BERT's own rules.
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
    max_word_chars=tokenizer.get("model", {}).get(
      "max_input_chars_per_word", WordRules.max_word_chars
    ),
  )


def _is_cased(pieces: Sequence[str]) -> bool:
  words = [piece for piece in pieces if not re.fullmatch(r"\[.*\]|<.*>", piece)]
  return (
    sum(word != word.lower() for word in words) > len(words) / 200
  )  # an uncased vocabulary has a stray letter at most


def _check_tokenizer(tokenizer: Mapping, path: str) -> None:
  """Refuses a tokenizer.json whose pieces are not BERT's."""
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
        f"{path!r} has the {what} {got!r}; known is {wanted[0]!r}, which BERT's tokenizers have. "
        "Use a BERT-like model."
      )


def _check_config(config: Mapping, special: Mapping, path: str) -> None:
  """Refuses a tokenizer_config.json of another tokenizer than BERT's."""
  name = config.get("tokenizer_class") or "BertTokenizer"
  if name.removesuffix("Fast").removesuffix("Tokenizer").removesuffix("Backend") not in _CLASSES:
    raise VocabularyError(
      f"{path!r} says {name}; known are those with BERT's word pieces: "
      f"{', '.join(_CLASSES[:6])} and their like."
    )
  if config.get("do_basic_tokenize") is False:
    raise VocabularyError(
      f"{path!r} says do_basic_tokenize=false: its texts were split into words by another program."
    )
  if config.get("wordpieces_prefix", _PREFIX) != _PREFIX:
    raise VocabularyError(
      f"{path!r} marks pieces inside a word by {config['wordpieces_prefix']!r}; "
      f"known is {_PREFIX!r}."
    )
  for values in (special, config):
    for wanted, key in zip(
      SPECIAL, ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    ):
      got = values.get(key) or wanted
      got = got["content"] if isinstance(got, Mapping) else got
      if got != wanted:
        raise VocabularyError(
          f"the tokenizer of {path!r} has {key} {got!r}; BERT's is {wanted!r}. "
          "Use a BERT-like model."
        )

"""Salient spans: names and dates. REALM, section 3.4.

Salient spans are the parts of a sentence that require knowledge of the world to fill in.

Dates are found by regular expressions. Names are found here by rules, which need no data and no
model: capitalised words, unless they are capitalised only because they begin a sentence. The paper
finds names with a tagger, which `realm_tf.train_tagger` trains.
"""

import re
from collections.abc import Collection, Iterable, Sequence

KIND = "spans"  # kind of the folders that hold sentences with spans, and of their record files

_MONTH = (
  r"(?:January|February|March|April|May|June|July|August|September|October|November|December"
  r"|(?:Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec)\.?)"
)
_DAY = r"[0-3]?\d(?:st|nd|rd|th)?"
_YEAR = r"(?:1\d{3}|20\d{2})"
_ERA = r"(?:BCE?|B\.C\.|CE|AD|A\.D\.)"
# units that follow a number of four digits that is not a year
_UNIT = (
  r"(?:people|inhabitants|men|troops|metres|meters|feet|miles|kilometres|kilometers|acres|hectares|tons|tonnes"
  r"|k?m|ft|kg|km2|mm)\b"
)
_DATE = re.compile(
  "|".join(
    [
      rf"\b{_DAY} (?:of )?{_MONTH}(?:,? {_YEAR}\b)?",  # 12 March 2004
      rf"\b{_MONTH} {_DAY}\b(?:, {_YEAR}\b)?",  # March 12, 2004
      rf"\b{_MONTH},? {_YEAR}\b",  # July 1969
      rf"\b\d{{1,2}}(?:st|nd|rd|th)[ -]century(?: {_ERA})?",  # 4th century BC
      rf"\b\d{{1,4}}(?: |–\d{{1,4}} ){_ERA}",  # 44 BC
      r"\bAD \d{1,4}\b",
      rf"(?<![\d.,$£€#]){_YEAR}s\b",  # 1990s
      rf"(?<![\w.,$£€#]){_YEAR}(?:[–-]\d{{2,4}})?(?![\w%]|[.,]\d| {_UNIT})",  # 1990, 1936–37
    ]
  )
)

_WORD = re.compile(
  r"(?:[^\W\d_]\.){2,}"  # U.S.
  r"|(?:[A-Z]|St|Dr|Mr|Mrs|Ms|Mt|Ft|Gen|Col|Capt|Lt|Prof|Rev|Sgt|Gov|Sen)\.(?= )"  # J.
  r"|[^\W\d_](?:\w|[-&](?=\w)|['’](?!s\b)(?=\w))*"
)
# text after which any word is capitalised
_BEGINS = re.compile(r"(?:^|[.!?:;]|[\"“‘])[\s\"“‘'(\[]*$")
_JOINERS = frozenset(
  (
    "of the de del della der den des di da do dos das du la le les el al bin ibn y e von van zu "
    "zur ten ter"
  ).split()
)
_COMMON = frozenset(
  """
    a about above according across after afterwards again against all almost along already also
    although always am among an and another any anyone are around as at away be became because been
    before behind being below beside besides between beyond both but by can cannot could currently
    did do does down due during each early either else even eventually ever every everyone few
    finally first following for former formerly from further had has have having he he'd he'll he's
    hence her here hers herself him himself his how however i i'd i'll i'm i've if in including
    indeed instead into is it it's its itself just last late later least less like many may maybe me
    meanwhile might mine more moreover most mostly much must my myself near nearly neither never
    nevertheless next no nobody none nonetheless nor not nothing now of off often on once one only
    onto or originally other others otherwise our ours ourselves out over own part per perhaps
    previously prior rather recently same second several shall she she'd she'll she's should
    similarly since so some someone something sometimes soon still subsequently such than that the
    their theirs them themselves then there thereafter therefore these they they'd they'll they're
    they've third this those though three through throughout thus to today together too toward
    towards two under unlike until up upon us usually very via was we we'd we'll we're we've were
    what whatever when whenever where whereas wherever whether which while who whoever whom whose
    why will with within without would yes yet you you'd you'll you're you've your yours yourself
    monday tuesday wednesday thursday friday saturday sunday january february march april may june
    july august september october november december mr. mrs. ms. dr.""".split()
)


def with_dates(sentence: str, names: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
  """Adds dates to names from any source.

  Returns:
    Character ranges [start, end), in order, without overlap. If a name and a date overlap, the date
    is kept.
  """
  dates = [match.span() for match in _DATE.finditer(sentence)]
  names = [
    (start, end)
    for start, end in names
    if not any(start < date_end and date_start < end for date_start, date_end in dates)
  ]
  return sorted(dates + names)


def find_names_of_passage(sentences: Sequence[str]) -> list[list[tuple[int, int]]]:
  """Runs `find_names` on each sentence of a passage.

  Whether a sentence's first word is a name depends on the passage's other sentences.
  """
  inner = [inner_names(sentence) for sentence in sentences]
  return [
    find_names(sentence, set().union(*inner[:i], *inner[i + 1 :]))
    for i, sentence in enumerate(sentences)
  ]


def inner_names(sentence: str) -> set[str]:
  """Returns the words that are capitalised although they do not begin a sentence."""
  return {
    match[0]
    for match in _WORD.finditer(sentence)
    if _is_name(match[0]) and not _begins(sentence, match)
  }


def find_names(sentence: str, known_names: Collection[str] = ()) -> list[tuple[int, int]]:
  """Finds the longest runs of capitalised words, with lower-case joiners allowed between them.

  Args:
    sentence: words separated by single spaces.
    known_names: words that are names even at the beginning of a sentence (see `inner_names`).

  Returns:
    Character ranges [start, end), in order, without overlap.
  """
  names = []
  words = list(_WORD.finditer(sentence))
  at = 0
  while at < len(words):
    last = _end_of_run(sentence, words, at)
    first_word = words[at]
    if last is None:
      at += 1
    else:
      if last > at or first_word[0] in known_names or not _begins(sentence, first_word):
        names.append((first_word.start(), words[last].end()))
      at = last + 1
  return names


def _end_of_run(sentence: str, words: Sequence[re.Match], first: int) -> int | None:
  """Returns the last word of the name that begins with word `first`, or None if there is none."""
  if not _is_name(words[first][0]):
    return None
  last = first
  for at in range(first + 1, len(words)):
    word = words[at][0]
    if sentence[words[at - 1].end() : words[at].start()] not in (" ", " & "):
      break
    if _is_name(word):
      last = at
    elif at - last > 2 or not (word in _JOINERS or (word[0].isupper() and word.lower() in _COMMON)):
      break
  return last


def _is_name(word: str) -> bool:
  return word[0].isupper() and word.lower() not in _COMMON


def _begins(sentence: str, word: re.Match) -> bool:
  return _BEGINS.search(sentence, max(0, word.start() - 8), word.start()) is not None

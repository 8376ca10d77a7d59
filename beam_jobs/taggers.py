"""Taggers, which find names in sentences: rules, a trained tagger, or a spaCy pipeline."""

import itertools
from collections.abc import Callable, Sequence

from realm_tf.spans import rules, span_tagger
from realm_tf.storage import artifacts

RULES, SPACY = "rules", "spacy:"  # or a folder
# Labels of spaCy that are not names.
_SPACY_NUMBERS = frozenset("DATE TIME PERCENT MONEY QUANTITY ORDINAL CARDINAL".split())
Tagger = Callable[[Sequence[Sequence[str]]], list[Sequence[tuple[int, int]]]]


class TaggerError(artifacts.UserError):
  """Raised for a --tagger that does not exist or finds nothing."""


def load_tagger(name: str) -> Tagger:
  """Loads a tagger: a function of the sentences of passages that finds names.

  The function returns the character ranges of the names in each sentence, for the sentences of all
  passages in one list.

  Raises:
    TaggerError: there is no such tagger.
  """
  if name == RULES:
    return lambda texts: [
      names for sentences in texts for names in rules.find_names_of_passage(sentences)
    ]
  if name.startswith(SPACY):
    nlp = _load_spacy(name)
    return lambda texts: [
      [
        (entity.start_char, entity.end_char)
        for entity in doc.ents
        if entity.label_ not in _SPACY_NUMBERS
      ]
      for doc in nlp.pipe(itertools.chain(*texts))
    ]
  model = span_tagger.load(_folder_of(name))
  return lambda texts: [
    [(span.start, span.end) for span in spans]
    for spans in span_tagger.find_names(model, list(itertools.chain(*texts)))
  ]


def recipe_of(name: str) -> tuple[dict, dict[str, str]]:
  """Returns the entries for a tagger in the config and the inputs of a spans folder's info.json."""
  if name == RULES:
    return {"tagger": RULES}, {}
  if name.startswith(SPACY):
    meta = _load_spacy(name).meta
    return {"tagger": name, "model": f"{meta['lang']}_{meta['name']}-{meta['version']}"}, {}
  return {"tagger": span_tagger.KIND}, {"tagger": _folder_of(name)}


def _folder_of(name: str) -> str:
  if not artifacts.gfile.isdir(name):
    raise TaggerError(
      f"--tagger={name!r} is unknown; wanted one of {RULES}, {SPACY}NAME, or a folder written by "
      "realm_tf.train_tagger."
    )
  return name


def _load_spacy(name: str):
  try:
    import spacy  # optional
  except ImportError:
    raise TaggerError(
      f"--tagger={name} needs spaCy, which is not installed: pip install spacy."
    ) from None
  try:
    return spacy.load(name.removeprefix(SPACY))
  except OSError as error:
    raise TaggerError(
      f"--tagger={name}: {error} (python -m spacy download NAME installs its models)"
    ) from None

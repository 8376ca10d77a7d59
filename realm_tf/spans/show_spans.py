"""Writes a web page of sentences with their salient spans, to judge or compare taggers.

    python -m realm_tf.spans.show_spans --spans=S,S2 --num=50 --output=docs/salient_spans.html \\
        --source='Wikipedia, CC BY-SA 3.0'

The sentences are drawn at random from all sentences of the passages, so some have no span. If two
folders are given, they must be of the same passages.
"""

import dataclasses
import html
from collections.abc import Iterator, Mapping, Sequence

from absl import flags

from realm_tf import cli

if __name__ == "__main__":
  flags.DEFINE_string("spans", None, "A spans folder, or two separated by a comma.", required=True)
  flags.DEFINE_integer("num", 50, "Number of sentences to show.")
  flags.DEFINE_integer("seed", 0, "Random seed for drawing the sentences.")
  flags.DEFINE_string("source", "", "Source of the text, and its licence.")
  flags.DEFINE_string("output", None, "The HTML page to write.", required=True)
  cli.start("realm_tf.spans.show_spans")

import numpy as np

from realm_tf.corpus import marks, passages, segments
from realm_tf.corpus.marks import Mark
from realm_tf.spans import rules, span_tagger
from realm_tf.storage import artifacts, ownership, paths

_CLASSES = ("first", "second")  # CSS classes of the marks in _PAGE

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Salient spans</title>
<style>
  :root {{ color-scheme: light dark; --ink: #1f2328; --dim: #667079; --line: #e4e7ea; --page: #fff;
    --first: #ffe9a8; --second: #2467d6; }}
  @media (prefers-color-scheme: dark) {{
    :root {{ --ink: #e6e8ea; --dim: #98a2ab; --line: #30363c; --page: #16191d; --first: #5c4a10;
      --second: #7fb0ff; }} }}
  body {{ margin: 0 auto; padding: 2.5rem 1.25rem; max-width: 46rem; background: var(--page);
    color: var(--ink); font: 1.0625rem/1.75 Georgia, "Noto Serif", serif; }}
  h1, header p, table, h2, footer {{ font-family: system-ui, -apple-system, "Segoe UI", "Noto Sans",
    sans-serif; }}
  h1 {{ margin: 0; font-size: 1.75rem; letter-spacing: -0.01em; }}
  header p, footer {{ color: var(--dim); font-size: 0.9375rem; line-height: 1.5; }}
  table {{ border-collapse: collapse; margin: 1.5rem 0 2.5rem; font-size: 0.9375rem;
    font-variant-numeric: tabular-nums; }}
  th, td {{ padding: 0.3rem 2rem 0.3rem 0; border-bottom: 1px solid var(--line); text-align: left;
    font-weight: normal; }}
  td {{ text-align: right; padding: 0.3rem 0 0.3rem 1rem; }}
  ol {{ list-style: none; margin: 0; padding: 0; }}
  li {{ padding: 0.9rem 0; border-top: 1px solid var(--line); overflow-wrap: anywhere; }}
  h2 {{ margin: 0 0 0.15rem; font-size: 0.75rem; font-weight: 600; letter-spacing: 0.03em;
    color: var(--dim); }}
  p {{ margin: 0; }}
  .first {{ background: var(--first); padding: 0.1em 0; }}
  .second {{ box-shadow: inset 0 -2px var(--second); }}
  .first.starts, .second.starts {{ border-top-left-radius: 4px; border-bottom-left-radius: 4px;
    margin-left: 1px; }}
  .first.ends, .second.ends {{ border-top-right-radius: 4px; border-bottom-right-radius: 4px;
    margin-right: 1px; }}
  footer {{ margin-top: 2rem; padding-top: 1rem; border-top: 1px solid var(--line); }}
</style>
</head>
<body>
<header>
<h1>Salient spans</h1>
<p>{intro}</p>
<table>
{table}
</table>
</header>
<ol>
{sentences}
</ol>
<footer>{source}</footer>
</body>
</html>
"""


@dataclasses.dataclass(frozen=True)
class Annotated:
  """A spans folder in memory.

  Attributes:
    tagger: name of its tagger on the page.
    passages_folder: folder of the annotated passages.
    num_sentences: number of sentences of the passages, with or without spans.
    num_spans: number of spans in them.
    spans: (passage, sentence) -> byte ranges [start, end).
  """

  tagger: str
  passages_folder: str
  num_sentences: int
  num_spans: int
  spans: Mapping[tuple[int, str], list[tuple[int, int]]]

  def all_spans(self) -> set[tuple]:
    return {(*where, *span) for where, spans in self.spans.items() for span in spans}


def read(folder: str) -> Annotated:
  """Reads a complete spans folder."""
  info, spans = artifacts.read_info(folder, kind=rules.KIND), {}
  for path in passages.shard_paths(folder, rules.KIND):
    for row in passages.read_shard(path, passages.Sentence):
      spans[row.passage, row.text] = [
        (row.token_starts[start], row.token_ends[end - 1])
        for start, end in zip(row.span_starts, row.span_ends, strict=True)
      ]
  tagger = info["config"]["tagger"]
  return Annotated(
    "trained tagger" if tagger == span_tagger.KIND else tagger,
    artifacts.find_input(folder, "passages", advice="Put them back, or annotate them again."),
    info["counts"]["sentences"],
    info["counts"]["spans"],
    spans,
  )


def marked(text: str, layers: Sequence[Sequence[tuple[int, int]]]) -> str:
  """Formats a sentence as HTML.

  The spans of each layer (byte ranges) have its class; where layers overlap, text has both classes.
  """
  named = [
    Mark(name, *span)
    for name, spans in zip(_CLASSES, layers, strict=False)  # there may be one layer
    for span in spans
  ]
  starts, ends = {mark.start for mark in named}, {mark.end for mark in named}
  parts = []
  for run in marks.runs(text, named):
    classes = [name for name in _CLASSES if name in run.names]
    classes += ["starts"] * (run.start in starts) + ["ends"] * (run.end in ends)
    part = html.escape(run.text)
    parts.append(f'<span class="{" ".join(classes)}">{part}</span>' if run.names else part)
  return "".join(parts)


def page(folders: Sequence[str], *, num: int, seed: int, source: str) -> str:
  """Returns the page as HTML.

  Args:
    folders: one or two spans folders of the same passages.
    num: number of sentences to draw.
    seed: random seed.
    source: source of the text and its licence; the last line of the page.

  Raises:
    ArtifactError: if a folder is not complete, or the second is of other passages.
  """
  layers = [read(folder) for folder in folders]
  for folder in folders[1:]:
    artifacts.check_input(folder, "passages", layers[0].passages_folder)
  drawn = np.random.default_rng(seed).choice(
    layers[0].num_sentences, min(num, layers[0].num_sentences), replace=False
  )
  wanted, rows = set(drawn.tolist()), []
  for at, (passage, text) in enumerate(_sentences(layers[0].passages_folder)):
    if at in wanted:
      spans = [layer.spans.get((passage.number, text), ()) for layer in layers]
      rows.append(f"<li><h2>{html.escape(passage.title)}</h2><p>{marked(text, spans)}</p></li>")
  keys = [
    f'<span class="{name} starts ends">{html.escape(layer.tagger)}</span>'
    for name, layer in zip(_CLASSES, layers, strict=False)  # there may be one layer
  ]
  intro = (
    f"{len(rows)} sentences out of {layers[0].num_sentences:,}, drawn at random. Names and dates "
    f"are marked as found by {' and by '.join(keys)}."
  )
  return _PAGE.format(
    intro=intro, table=_table(layers, keys), sentences="\n".join(rows), source=html.escape(source)
  )


def _sentences(passages_folder: str) -> Iterator[tuple[passages.Passage, str]]:
  """Yields the sentences of the passages that are not deleted, with their passages."""
  deleted = set(segments.read_deleted(passages_folder).tolist())
  for path in passages.shard_paths(passages_folder, passages.KIND):
    rows = passages.read_shard(path, passages.Passage)
    for passage in (row for row in rows if row.number not in deleted):
      for text in passages.sentences_of(
        passage.text, passage.sentence_starts, passage.sentence_ends
      ):
        yield passage, text


def _table(layers: Sequence[Annotated], keys: Sequence[str]) -> str:
  rows = [
    (f"spans per 1,000 sentences by {key}", layer.num_spans)
    for layer, key in zip(layers, keys, strict=False)  # no more than two are shown
  ]
  if len(layers) == 2:
    rows.append(("the same span by both", len(layers[0].all_spans() & layers[1].all_spans())))
  return "\n".join(
    f"<tr><th>{name}</th><td>{1000 * count / layers[0].num_sentences:,.0f}</td></tr>"
    for name, count in rows
  )


def main(argv: Sequence[str]) -> None:
  del argv
  args = flags.FLAGS
  folders = paths.split(args.spans)
  ownership.check_file(args.output, reads=folders)
  artifacts.write_text(args.output, page(folders, num=args.num, seed=args.seed, source=args.source))
  print(f"show_spans: {args.output}")

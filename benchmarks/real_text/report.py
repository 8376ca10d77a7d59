"""Formats the scores as a table and a plot."""

import io
from collections.abc import Mapping, Sequence

import matplotlib.figure
import numpy as np
import tabulate

from benchmarks.real_text import statistics
from benchmarks.real_text.rank import RULES
from benchmarks.real_text.statistics import METRICS, Estimate
from benchmarks.real_text.systems import BM25, PAIRS
from realm_tf.storage import artifacts

NOTE = (
  "The published encoder was trained on Natural Questions, SQuAD and MS MARCO, among other data."
)
RULE_WORDS = {
  "answer": "a passage that holds an answer",
  "strict": "a passage with the title of the question that holds an answer",
}
_LEGEND = (
  "In percent, mean over seeds [95% bootstrap interval over questions]. Differences are "
  "paired by question."
)
_INK, _PALE = "#333333", "#cbd5e0"
_COLORS = {"answer": "#2b6cb0", "strict": "#dd6b20"}
_BEST_BY = METRICS.index("recall@5")

Ranks = Mapping[str, Mapping[int, Mapping[str, np.ndarray]]]  # system → seed → rule → ranks [N]


def compare(dev: Ranks, found: Ranks) -> dict:
  """Compares systems on one half of a question set: each system, and each pair with both scored.

  Args:
    dev: ranks on the dev half, which determine the best system.
    found: ranks on this half.

  Returns:
    "questions": N; "systems": system → {"seeds", rule → metric → {"mean", "low", "high"}};
    "differences": list of {"better", "worse", "seed" (None: all), rule → as above}. Shares, 0 to 1.
  """
  values = {
    system: {
      seed: {rule: statistics.values_of(ranks[rule]) for rule in RULES}
      for seed, ranks in seeds.items()
    }
    for system, seeds in found.items()
  }
  size = len(next(iter(next(iter(found.values())).values()))["answer"])
  resamples = statistics.draw(size)

  def told(rows: Sequence[Mapping[str, np.ndarray]]) -> dict:
    return {
      rule: _told(statistics.estimate(np.stack([row[rule] for row in rows]), resamples))
      for rule in RULES
    }

  differences = []
  for better, worse in [*PAIRS, *((best, BM25) for best in best_of(dev))]:
    both = sorted(set(values.get(better, {})) & set(values.get(worse, {})))
    gaps = {
      seed: {rule: values[better][seed][rule] - values[worse][seed][rule] for rule in RULES}
      for seed in both
    }
    for seeds in [both, *([seed] for seed in both if len(both) > 1)] if both else ():
      name = None if seeds == both else seeds[0]
      differences.append(
        {
          "better": better,
          "worse": worse,
          "seed": name,
          "seeds": seeds,
          **told([gaps[seed] for seed in seeds]),
        }
      )
  systems = {
    system: {"seeds": sorted(seeds), **told(list(seeds.values()))}
    for system, seeds in values.items()
  }
  return {"questions": size, "systems": systems, "differences": differences}


def best_of(dev: Ranks) -> list[str]:
  """Returns the dense system with the highest recall@5 by the answer rule, if there is any."""
  scores = {
    system: np.mean(
      [statistics.values_of(ranks["answer"])[:, _BEST_BY].mean() for ranks in seeds.values()]
    )
    for system, seeds in dev.items()
    if system != BM25
  }
  return [max(scores, key=lambda system: scores[system])] if scores else []


def _told(found: Estimate) -> dict:
  return {
    metric: {name: round(float(getattr(found, name)[at]), 6) for name in ("mean", "low", "high")}
    for at, metric in enumerate(METRICS)
  }


# ------------------------------------------------------------------------------------------- table


def table_of(results: Mapping, names: Mapping[str, str]) -> str:
  """Formats the results as text, in percent.

  Args:
    results: {"title", "note", "sets": set → half → output of `compare`}.
    names: system → its display name.
  """
  parts = [results["title"], *filter(None, [results["note"]]), _LEGEND]
  for name, halves in results["sets"].items():
    for half, found in halves.items():
      for rule, words in RULE_WORDS.items():
        parts.append(f"{name}, {half} half, {found['questions']} questions; correct is {words}:")
        parts.append(_scores(found, rule, names))
        if found["differences"]:
          parts.append(_differences(found, rule, names))
  return "\n\n".join(parts) + "\n"


def _scores(found: Mapping, rule: str, names: Mapping[str, str]) -> str:
  rows = [
    [names[system], *_cells(scores[rule], ""), ", ".join(map(str, scores["seeds"]))]
    for system, scores in found["systems"].items()
  ]
  return _tabulate(rows, ["", *METRICS, "seeds"])


def _differences(found: Mapping, rule: str, names: Mapping[str, str]) -> str:
  rows = [
    [
      f"{names[row['better']]} - {names[row['worse']]}" if row["seed"] is None else "",
      *_cells(row[rule], "+"),
      ", ".join(map(str, row["seeds"])),
    ]
    for row in found["differences"]
  ]
  return _tabulate(rows, ["difference", *METRICS, "seeds"])


def _cells(scores: Mapping[str, Mapping[str, float]], sign: str) -> list[str]:
  found = []
  for metric in METRICS:
    mean, low, high = (f"{100 * scores[metric][end]:{sign}.1f}" for end in ("mean", "low", "high"))
    found.append(f"{mean} [{low}, {high}]")
  return found


def _tabulate(rows: Sequence[Sequence], heads: Sequence[str]) -> str:
  return tabulate.tabulate(rows, heads, stralign="right", colalign=("left",), disable_numparse=True)


# -------------------------------------------------------------------------------------------- plot


def plot(results: Mapping, names: Mapping[str, str], path: str) -> None:
  """Plots the metrics of all systems with intervals, with a row of panels for each set and half.

  Args:
    results: see `table_of`.
    names: system → its display name.
    path: path of the PNG to write.
  """
  panels = [
    (name, half, found)
    for name, halves in results["sets"].items()
    for half, found in halves.items()
  ]
  most = max(len(found["systems"]) for *_, found in panels)
  figure = matplotlib.figure.Figure(
    figsize=(13, (0.34 * most + 1.1) * len(panels) + 0.7), layout="constrained"
  )
  figure.suptitle(
    results["title"] + (f"\n{results['note']}" if results["note"] else ""), color=_INK, fontsize=11
  )
  grid = figure.subplots(len(panels), len(METRICS), squeeze=False, sharey="row")
  for row, (name, half, found) in zip(grid, panels, strict=True):
    for axes, metric in zip(row, METRICS, strict=True):
      _draw(axes, found["systems"], metric)
      axes.set_title(f"{metric}, %", loc="left", fontsize=9, color=_INK)
    row[0].set_yticks(range(len(found["systems"])), [names[system] for system in found["systems"]])
    row[0].set_ylim(len(found["systems"]) - 0.4, -0.6)
    row[0].set_ylabel(
      f"{name}\n{half} half, {found['questions']} questions", fontsize=9, color=_INK
    )
  handles, labels = grid[0][0].get_legend_handles_labels()
  figure.legend(
    handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9
  )
  png = io.BytesIO()
  figure.savefig(png, format="png", dpi=110)
  with artifacts.gfile.GFile(path, "wb") as file:
    file.write(png.getvalue())


def _draw(axes, systems: Mapping[str, Mapping], metric: str) -> None:
  for rule, shift in zip(RULES, (-0.14, 0.14), strict=True):
    found = [scores[rule][metric] for scores in systems.values()]
    mean, low, high = (
      100 * np.array([one[end] for one in found]) for end in ("mean", "low", "high")
    )
    axes.errorbar(
      mean,
      np.arange(len(found)) + shift,
      xerr=[mean - low, high - mean],
      fmt="o",
      markersize=4,
      linewidth=1.2,
      color=_COLORS[rule],
      label=RULE_WORDS[rule],
    )
  axes.grid(axis="x", color=_PALE, linewidth=0.6)
  axes.set_axisbelow(True)
  axes.tick_params(labelsize=8, colors=_INK, length=0)
  axes.spines[["top", "right", "left"]].set_visible(False)

"""Formats the rates of all sides as a table and a plot."""

import datetime
import os
import platform
import re
from collections.abc import Mapping, Sequence

import matplotlib.figure
import numpy as np
import tabulate

from benchmarks.speed import sides
from benchmarks.speed.jobs import EMBEDDING, REALM_STEP

UNITS = {REALM_STEP: "examples/s", EMBEDDING: "word pieces/s"}
_INK, _PALE, _COLOR = "#333333", "#cbd5e0", "#2b6cb0"


def machine() -> dict:
  """Returns what is measured on, and when."""
  try:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
      model = re.search(r"model name\s*: (.*)", file.read())
  except FileNotFoundError:
    model = None
  return {
    "date": datetime.date.today().isoformat(),
    "cpu": model[1] if model else platform.processor(),
    "cores": len(os.sched_getaffinity(0)),
    "python": platform.python_version(),
  }


def row_of(
  case: Mapping,
  *,
  timing: sides.Timing,
  size: float,
  gaps: Mapping[str, float],
  versions: Mapping[str, Mapping[str, str]],
  load_before: float,
) -> dict:
  """Returns the results of one case.

  Args:
    case: its fields, such as the size and the batch.
    timing: what was measured.
    size: units (see UNITS) in a step.
    gaps: side → its greatest relative difference from the reference.
    versions: side → package → version.
    load_before: the machine's load average before any side was started.
  """
  rates = {side: np.array(found) * size for side, found in timing.rates.items()}
  ours = [side for side in rates if sides.environment_of(side) is None]
  return {
    **case,
    "load_before": round(load_before, 2),
    "load_during": [round(load, 2) for load in timing.loads],
    "sides": {
      side: {
        "rate": _spread(found),
        "cores": _spread(np.array(timing.cores[side])),
        "difference": gaps[side],
        "versions": dict(versions[side]),
        "ratios": {own: _spread(rates[own] / found) for own in ours if own != side},
      }
      for side, found in rates.items()
    },
  }


def _spread(values: np.ndarray) -> dict[str, float]:
  """Returns the median of the rounds, the least and the greatest."""
  named = {"median": np.median(values), "min": np.min(values), "max": np.max(values)}
  return {name: float(f"{value:.5g}") for name, value in named.items()}


def table_of(results: Mapping) -> str:
  """Formats results as text.

  Args:
    results: {"work", "command", "machine", "rounds", "rows": list of `row_of`}.
  """
  about, unit = results["machine"], UNITS[results["work"]]
  ours = list(dict.fromkeys(own for row in results["rows"] for own in _ours(row)))
  lines = []
  for row in results["rows"]:
    for side, found in row["sides"].items():
      ratios = [_cell(found["ratios"][own]) if own in found["ratios"] else None for own in ours]
      gap = f"{found['difference']:.0e}"
      cores = f"{found['cores']['median']:.1f}"
      lines.append([_name(row), side, _cell(found["rate"]), *ratios, cores, gap, _load(row)])
  heads = ["", "side", unit, *(f"{own} / it" for own in ours), "cores", "difference", "load"]
  text = tabulate.tabulate(lines, heads, missingval="-", disable_numparse=True)
  return (
    f"{results['command']}\n{about['date']}, {about['cpu']}, cores: {about['cores']}\n\n{text}\n\n"
    f"Medians of {results['rounds']} rounds [least, greatest]; ratios are paired by round.\n"
    "cores: those that the side's threads got. difference: of losses or embeddings from "
    "ours-float32.\nload: the machine's load average before, and the greatest during the rounds.\n"
  )


def _ours(row: Mapping) -> list[str]:
  return [side for side in row["sides"] if sides.environment_of(side) is None]


def _name(row: Mapping) -> str:
  batch = f", batch {row['batch_size']}" if row["work"] == REALM_STEP else ""
  return f"{row['layers']} x {row['hidden']}{batch}, {row['lengths']} lengths"


def _load(row: Mapping) -> str:
  return f"{row['load_before']:.1f}, {max(row['load_during']):.1f}"


def _cell(values: Mapping[str, float]) -> str:
  if values["median"] < 1000:
    return "{median:.3g} [{min:.3g}, {max:.3g}]".format(**values)
  return "{median:,.0f} [{min:,.0f}, {max:,.0f}]".format(**values)


def plot(results: Mapping, path: str) -> None:
  """Plots the rates of all sides with their spread, in a panel for each case.

  Args:
    results: see `table_of`.
    path: path of the PNG to write.
  """
  rows = results["rows"]
  about = results["machine"]
  height = sum(0.3 * len(row["sides"]) + 0.7 for row in rows) + 0.8
  figure = matplotlib.figure.Figure(figsize=(8, height), layout="constrained")
  title = f"{results['work']}, {about['date']}, cores: {about['cores']}"
  figure.suptitle(title, color=_INK, fontsize=11)
  ratios = [len(row["sides"]) + 1 for row in rows]
  panels = figure.subplots(len(rows), 1, squeeze=False, height_ratios=ratios)[:, 0]
  for axes, row in zip(panels, rows, strict=True):
    _draw(axes, row["sides"])
    axes.set_title(_name(row), loc="left", fontsize=9, color=_INK)
  panels[-1].set_xlabel(UNITS[results["work"]], fontsize=9, color=_INK)
  figure.savefig(path, dpi=110)


def _draw(axes, found: Mapping[str, Mapping]) -> None:
  names: Sequence[str] = list(found)
  middle, low, high = (
    np.array([found[name]["rate"][end] for name in names]) for end in ("median", "min", "max")
  )
  spread = [middle - low, high - middle]
  axes.barh(range(len(names)), middle, xerr=spread, height=0.6, color=_COLOR, ecolor=_INK)
  axes.set_yticks(range(len(names)), names)
  axes.invert_yaxis()
  axes.grid(axis="x", color=_PALE, linewidth=0.6)
  axes.set_axisbelow(True)
  axes.tick_params(labelsize=8, colors=_INK, length=0)
  axes.spines[["top", "right", "left"]].set_visible(False)

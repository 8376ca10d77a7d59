"""Plots of REALM pre-training."""

import io
import itertools
from collections.abc import Mapping, Sequence

import matplotlib.figure

from realm_tf.storage import artifacts

_INK, _LINE, _PALE = "#333333", "#2b6cb0", "#cbd5e0"


def plot_training(rows: Sequence[Mapping[str, float]], path: str) -> None:
  """Plots loss, retrieval utility, recall on held-out clozes and the index's age.

  A vertical line marks every switch to a new index.

  Args:
    rows: rows of metrics.jsonl, by step.
    path: path of the PNG file to write.
  """
  panels = {
    "loss": ("loss", "-log p(y|x)"),
    "retrieval_utility": ("retrieval utility", "log p(y|x) - log p(y|null)"),
    "dev_cloze_recall_at_5": ("recall@5 on held-out clozes", "%"),
    "index_age_steps": ("age of the index in use", "training steps"),
  }
  panels = {name: texts for name, texts in panels.items() if any(name in row for row in rows)}
  figure = matplotlib.figure.Figure(figsize=(9, 1.9 * len(panels) + 0.6), layout="constrained")
  figure.suptitle("REALM pre-training", color=_INK)
  for axes, (name, (title, unit)) in zip(
    figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0], panels.items(), strict=True
  ):
    for before, row in itertools.pairwise(rows):
      if row["refreshes"] > before["refreshes"]:
        axes.axvline(row["step"], color=_PALE, linewidth=1, zorder=0)
    factor = 100 if unit == "%" else 1
    drawn = [(row["step"], factor * row[name]) for row in rows if name in row]
    style = "steps-post" if name == "dev_cloze_recall_at_5" else "default"
    axes.plot(*zip(*drawn, strict=True), color=_LINE, linewidth=1.6, drawstyle=style)
    axes.set_title(title, loc="left", fontsize=10, color=_INK)
    axes.set_ylabel(unit, fontsize=8, color=_INK)
    axes.margins(x=0.01)
    axes.tick_params(labelsize=8, colors=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    if name != "loss":
      values = [value for _, value in drawn]
      axes.set_ylim(min(0.0, *values), 1.1 * max(*values, 1e-3))
  axes.set_xlabel("training step   (grey: switch to a refreshed index)", fontsize=9, color=_INK)
  png = io.BytesIO()
  figure.savefig(png, format="png", dpi=120)
  with artifacts.gfile.GFile(path, "wb") as file:
    file.write(png.getvalue())

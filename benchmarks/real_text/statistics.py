"""Recall and MRR with bootstrap intervals, computed from ranks in plain NumPy."""

import dataclasses

import numpy as np

METRICS = ("recall@1", "recall@5", "recall@20", "MRR")
_DEPTHS = (1, 5, 20)
RESAMPLES = 10_000
_AT_ONCE = 500  # resamples drawn together


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Means over questions with the ends of their 95% intervals, each [M] float64, by `METRICS`."""

  mean: np.ndarray
  low: np.ndarray
  high: np.ndarray


def values_of(ranks: np.ndarray) -> np.ndarray:
  """Returns the metrics of each question: recall@k is 1 up to rank k, MRR is 1 / rank.

  Args:
    ranks: [..., N] float64 from 1; inf if no correct passage was found.

  Returns:
    [..., N, M] float64.
  """
  recalls = [ranks <= depth for depth in _DEPTHS]
  return np.stack([*recalls, 1 / ranks], axis=-1).astype(np.float64)


def draw(num_questions: int, *, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
  """Draws questions with replacement.

  Returns:
    [R, N] float32: share of each question in each resample.
  """
  rng, n = np.random.default_rng(seed), num_questions
  parts = []
  for start in range(0, resamples, _AT_ONCE):
    size = min(_AT_ONCE, resamples - start)
    drawn = rng.integers(0, n, [size, n]) + n * np.arange(size)[:, None]
    parts.append(np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n))
  return np.concatenate(parts).astype(np.float32) / n


def estimate(values: np.ndarray, resamples: np.ndarray) -> Estimate:
  """Computes means over questions with percentile bootstrap intervals.

  For paired differences, pass the differences of the values of two systems: the same questions are
  then drawn for both.

  Args:
    values: [S, N, M] float64, by seed; seeds are averaged for each question before drawing.
    resamples: [R, N], from `draw`.
  """
  values = values.mean(axis=0)  # [N, M]
  low, high = np.percentile(resamples @ values, [2.5, 97.5], axis=0)
  return Estimate(values.mean(axis=0), low, high)

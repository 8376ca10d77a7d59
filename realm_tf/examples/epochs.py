"""Rows of a training step: each epoch is another permutation, which is never held in memory."""

import math

import numpy as np

_ROUNDS = 8  # Feistel rounds of the permutation


def epoch_rows(
  num_rows: int, step: int, batch_size: int, seed: int, rows: np.ndarray | None = None
) -> np.ndarray:
  """Returns the row numbers [B] of a step, where every epoch is a fresh permutation.

  The result depends only on the arguments, so a resumed run gets the same rows.
  """
  at = np.arange(step * batch_size, (step + 1) * batch_size)
  epochs = at // num_rows
  picked = np.empty([batch_size], np.int64)
  for epoch in np.unique(epochs):
    inside = epochs == epoch
    keys = np.random.default_rng([seed, 7, epoch]).integers(1 << 64, size=_ROUNDS, dtype=np.uint64)
    picked[inside] = _permuted(at[inside] % num_rows, num_rows, keys)
  return picked if rows is None else rows[picked]


def _permuted(places: np.ndarray, num_rows: int, keys: np.ndarray) -> np.ndarray:
  """Returns the rows [B] at some places of a pseudo-random permutation of range(num_rows).

  The permutation is never held in memory. It is a Feistel network over the smallest square of at
  least `num_rows` cells (Black and Rogaway 2002): each round moves along one side of the square by
  a function of the other. A result outside of the rows is permuted again until it is inside.

  Args:
    places: [B] int, each at least 0 and less than `num_rows`.
    num_rows: number of rows that are permuted.
    keys: [rounds] uint64.
  """
  side = np.uint64(math.isqrt(num_rows - 1) + 1)
  moved, outside = places.astype(np.uint64), np.arange(len(places))
  while len(outside):
    left, right = np.divmod(moved[outside], side)
    for key in keys:
      left, right = right, (left + mixed(right ^ key) % side) % side
    moved[outside] = left * side + right
    outside = outside[moved[outside] >= num_rows]
  return moved.astype(np.int64)


def mixed(x: np.ndarray) -> np.ndarray:
  """Mixes the bits of each uint64 (SplitMix64, Steele et al. 2014)."""
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))

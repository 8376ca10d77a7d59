"""What the pipeline says at its end."""

import pytest

from realm_tf.pipeline import summary


@pytest.mark.parametrize(
  "refreshes, wanted",
  [
    (0, "REALM trained with its first index, which was at most 100 steps old."),
    (
      1,
      "1 index refresh ran during 7 training steps; the index in use was at most 100 steps old, "
      "and at most 50 behind the newest snapshot.",
    ),
    (
      3,
      "3 index refreshes ran during 7 training steps; the index in use was at most 100 steps old, "
      "and at most 50 behind the newest snapshot.",
    ),
  ],
)
def test_refreshes_are_told_in_words(refreshes, wanted):
  counts = {
    "refreshes": refreshes,
    "steps_during_refreshes": 7,
    "max_index_age_steps": 100,
    "max_staleness_steps": 50,
  }
  assert summary.describe_refreshes(counts) == wanted

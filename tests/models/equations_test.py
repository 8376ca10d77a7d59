"""REALM's equations, the best span and marks on a text, checked with NumPy and by hand."""

import numpy as np
import pytest
import tensorflow as tf

from realm_tf.corpus import marks
from realm_tf.corpus.marks import Mark
from realm_tf.models import equations, span_reader
from realm_tf.storage import paths


@pytest.fixture
def drawn() -> dict[str, np.ndarray]:
  """B 3, C 4, M 5."""
  rng = np.random.default_rng(0)
  return {
    "scores": rng.normal(size=[3, 4]) * 3,
    "token_log_probs": np.log(rng.uniform(size=[3, 4, 5])),
    "target_mask": np.array([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0]], np.float64),
  }


def by_hand(drawn) -> dict[str, np.ndarray]:
  """Computes in probabilities instead of logarithms."""
  prior = np.exp(drawn["scores"]) / np.exp(drawn["scores"]).sum(axis=1, keepdims=True)
  tokens = np.exp(drawn["token_log_probs"])  # [B, C, M]
  likelihoods = np.where(drawn["target_mask"][:, None] > 0, tokens, 1).prod(axis=-1)  # [B, C]
  marginal = (likelihoods * prior).sum(axis=1)
  return {
    "log_prior": np.log(prior),
    "log_likelihoods": np.log(likelihoods),
    "log_marginal": np.log(marginal),
    "of_tokens": np.log((tokens * prior[:, :, None]).sum(axis=1)),
    "candidate_utility": np.log(likelihoods / likelihoods[:, :1]),
    "retrieval_utility": np.log(marginal / likelihoods[:, 0]),
  }


def computed(scores, token_log_probs, target_mask) -> dict:
  prior = equations.log_prior(scores)
  likelihoods = equations.log_likelihoods(token_log_probs, target_mask)
  return {
    "log_prior": prior,
    "log_likelihoods": likelihoods,
    "log_marginal": equations.log_marginal(likelihoods, prior),
    "of_tokens": equations.log_marginal(token_log_probs, prior),
    "candidate_utility": equations.candidate_utility(likelihoods),
    "retrieval_utility": equations.retrieval_utility(likelihoods, prior),
  }


@pytest.mark.parametrize("compute", [computed, tf.function(computed)], ids=["eager", "graph"])
def test_equations_against_numpy(drawn, compute):
  got, wanted = compute(**drawn), by_hand(drawn)
  for name, values in wanted.items():
    np.testing.assert_allclose(np.asarray(got[name]), values, rtol=1e-12, atol=1e-12, err_msg=name)
  single = compute(**{name: values.astype(np.float32) for name, values in drawn.items()})
  for name, values in wanted.items():
    assert single[name].dtype == np.float32
    np.testing.assert_allclose(np.asarray(single[name]), values, rtol=1e-5, atol=1e-5)


def test_spans_of_whole_words_by_hand():
  continues = np.array([[False, True, False, False, True], [True, False, False, False, False]])
  got = np.array(span_reader.whole_word_mask(continues, max_span=3))
  wanted = np.zeros([2, 5, 3], bool)
  for row, start, size in np.ndindex(2, 5, 3):
    after = start + size + 1
    goes_on = after < 5 and continues[row, after]
    wanted[row, start, size] = not continues[row, start] and not goes_on
  np.testing.assert_array_equal(got, wanted)


def test_the_best_span_is_the_first_of_those_allowed():
  scores = np.array([[3, 1, 2, 2], [0, 1, -5, -7], [1, 2, 3, 4]], np.float32)
  allowed = np.array([[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]], bool)
  assert np.array(span_reader.best_span(scores, allowed)).tolist() == [2, 2, 0]


def test_marks_cut_a_text_at_their_bounds():
  """Marks are byte ranges; an empty mark covers nothing."""
  named = [Mark("a", 0, 3), Mark("b", 2, 6), Mark("a", 5, 6), Mark("c", 4, 4)]
  got = marks.runs("Öxyzu", named)
  assert [(run.text, "".join(sorted(run.names))) for run in got] == [
    ("Ö", "a"),
    ("x", "ab"),
    ("y", "b"),
    ("z", "b"),
    ("u", "ab"),
  ]
  assert [(run.start, run.end) for run in got] == [(0, 2), (2, 3), (3, 4), (4, 5), (5, 6)]
  assert marks.runs("", []) == [] and [run.names for run in marks.runs("x", [])] == [frozenset()]


def test_a_file_is_whole_or_as_it_was(tmp_path):
  path = tmp_path / "file"
  path.write_text("before")
  with pytest.raises(RuntimeError, match="^stop$"):
    with paths.whole(str(path)) as partial:
      with open(partial, "w") as file:
        file.write("half")
      raise RuntimeError("stop")
  assert path.read_text() == "before" and [path] == list(tmp_path.iterdir())
  with paths.whole(str(path)) as partial:
    with open(partial, "w") as file:
      file.write("after")
    assert path.read_text() == "before"
  assert path.read_text() == "after" and [path] == list(tmp_path.iterdir())

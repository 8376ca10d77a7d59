"""Maximum inner product search by ScaNN, whose op is not one of TensorFlow's own."""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from realm_tf.corpus.candidates import NULL_PASSAGE
from realm_tf.retrieval import approximate
from realm_tf.retrieval.approximate import ApproximateSearcher, Width
from realm_tf.retrieval.index_config import IndexConfig
from realm_tf.storage import artifacts, paths, saved_models

# numbers of candidates to score exactly that are tried, per requested passage
_REORDER_TIMES = (
  2,
  3,
  4,
  5,
  7,
  10,
  15,
  20,
  30,
  50,
  100,
  200,
)


class ScannSearcher(ApproximateSearcher):
  """Searches by ScaNN (Guo et al. 2020).

  ScaNN uses partitions, anisotropic codes, and scores of the best candidates that are exact, unless
  these are computed in int8.

  Args:
    state: the searcher's tensors, as `scann_ops` serialises them.
    settings: see `ApproximateSearcher`.
  """

  kind = "scann"

  def __init__(self, state: tf.Module, **settings):
    super().__init__(**settings)
    self.state = state

  @classmethod
  def build(
    cls, embeddings: np.ndarray, config: IndexConfig, queries: np.ndarray | None = None
  ) -> "ScannSearcher":
    num_rows, scann_ops = len(embeddings), _scann_ops()
    embeddings = np.asarray(embeddings, np.float32)  # as ScaNN wants them
    if num_rows < approximate.MIN_ROWS:  # too few to train the codebooks well
      searcher = scann_ops.builder(embeddings, 1, "dot_product").score_brute_force().build()
      return cls(_state_of(searcher), num_rows=num_rows, num_leaves=0, widths=(), num_queries=0)
    num_leaves = approximate.num_leaves_of(config, num_rows)
    samples = approximate.samples(embeddings, queries)  # before ScaNN allocates memory
    builder = scann_ops.builder(embeddings, 1, "dot_product")
    builder.tree(
      num_leaves, num_leaves, training_sample_size=min(num_rows, approximate.SAMPLE_ROWS)
    )
    builder.score_ah(config.dimensions_per_block, anisotropic_quantization_threshold=0.2)
    quantize = config.reorder_type == "int8"
    searcher = builder.reorder(_REORDER_TIMES[0], quantize=quantize).build()

    def scores_of(queries, num, leaves, reorder):
      numbers, scores = (
        part.numpy()
        for part in searcher.search_batched_parallel(
          queries,
          final_num_neighbors=num,
          pre_reorder_num_neighbors=reorder,
          leaves_to_search=leaves,
        )
      )
      found = ~np.isnan(scores)
      if quantize:  # its scores are not exact
        rows = embeddings[np.where(found, numbers, 0)]  # [Q, num, D]
        scores = np.einsum("qd,qnd->qn", queries, rows)
      scores = np.where(found, scores, -np.inf)
      return np.pad(scores, [[0, 0], [0, num - scores.shape[1]]], constant_values=-np.inf)

    widths = approximate.choose_widths(
      samples,
      scores_of,
      config,
      num_rows=num_rows,
      num_leaves=num_leaves,
      reorder_times=_REORDER_TIMES,
    )
    return cls(
      _state_of(searcher),
      num_rows=num_rows,
      num_leaves=num_leaves,
      widths=widths,
      num_queries=0 if queries is None else len(queries),
    )

  def save(self, folder: str) -> None:
    saved_models.save(
      self.state, folder, options=tf.saved_model.SaveOptions(namespace_whitelist=["Scann"])
    )

  @classmethod
  def load(cls, folder: str, *, widths: Sequence[dict], **settings) -> "ScannSearcher":
    _scann_ops()  # registers the op that the SavedModel holds
    return cls(
      tf.saved_model.load(paths.literal(folder)),
      widths=[Width(**width) for width in widths],
      **settings,
    )

  @tf.function(autograph=False, reduce_retracing=True)
  def _search(self, queries, num, leaves, reorder):
    # Inside a tf.function, the op keeps its searcher between calls; eager calls would rebuild it.
    numbers, scores = (
      _scann_ops()
      .searcher_from_module(self.state)
      .search_batched_parallel(
        queries, final_num_neighbors=num, pre_reorder_num_neighbors=reorder, leaves_to_search=leaves
      )
    )
    missing = tf.math.is_nan(scores)
    numbers, scores = tf.where(missing, NULL_PASSAGE, numbers), tf.where(missing, -np.inf, scores)
    # ScaNN returns as many columns as its fullest row has
    padding = [
      [0, 0],
      [0, num - tf.shape(scores)[1]],
    ]
    return tf.pad(numbers, padding, constant_values=NULL_PASSAGE), tf.pad(
      scores, padding, constant_values=-np.inf
    )


def _state_of(searcher) -> tf.Module:
  """Returns the tensors of a searcher of `scann_ops`, and frees the searcher itself.

  TensorFlow would keep it until the process ends.
  """
  state = searcher.serialize_to_module()
  tf.raw_ops.DestroyResourceOp(resource=searcher.searcher_handle)
  return state


def _scann_ops():
  """Returns ScaNN's TensorFlow ops; imported lazily because exact search does not need ScaNN."""
  try:
    from scann.scann_ops.py import scann_ops
  except (ImportError, tf.errors.NotFoundError) as error:
    raise artifacts.ArtifactError(
      f"searcher 'scann' needs the scann package built for TensorFlow {tf.__version__} ({error}). "
      "Install the versions in requirements.txt, or use searcher 'exact'."
    ) from error
  return scann_ops

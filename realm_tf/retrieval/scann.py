"""Maximum inner product search by ScaNN, whose op is not one of TensorFlow's own."""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

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
  """Searches by ScaNN (Guo et al. 2020): partitions, and in them anisotropic codes.

  Memory for 13.35 million passages of 128 dimensions: the codes take 0.9 GB. The embeddings, from
  which the scores of the best candidates are computed, take 6.8 GB, or half of that in float16 or
  bfloat16. ScaNN would hold them twice, and compute the same scores.

  Args:
    embeddings: see `ApproximateSearcher`.
    state: ScaNN's tensors, as `scann_ops` serialises them; None if every passage is scored exactly.
    settings: see `ApproximateSearcher`.
  """

  kind = "scann"

  def __init__(self, embeddings: np.ndarray, state: tf.Module | None, **settings):
    super().__init__(embeddings, **settings)
    self.state = state

  @classmethod
  def build(
    cls, embeddings: np.ndarray, config: IndexConfig, queries: np.ndarray | None = None
  ) -> "ScannSearcher":
    num_rows, scann_ops = len(embeddings), _scann_ops()
    if num_rows < approximate.MIN_ROWS:  # too few to train the codebooks well
      return cls(embeddings, None, num_leaves=0, widths=(), num_queries=0)
    num_leaves = approximate.num_leaves_of(config, num_rows)
    samples = approximate.samples(embeddings, queries)  # before ScaNN allocates memory
    builder = scann_ops.builder(np.asarray(embeddings, np.float32), 1, "dot_product")
    builder.tree(
      num_leaves, num_leaves, training_sample_size=min(num_rows, approximate.SAMPLE_ROWS)
    )
    builder.score_ah(config.dimensions_per_block, anisotropic_quantization_threshold=0.2)
    built = builder.build()
    searcher = cls(
      embeddings,
      None,
      num_leaves=num_leaves,
      widths=(),
      num_queries=0 if queries is None else len(queries),
    )

    def scores_of(queries, num, leaves, reorder):
      candidates = searcher._candidates(built, queries, leaves, reorder)
      return searcher.best(queries, candidates, num).scores.numpy()

    searcher.widths = approximate.choose_widths(
      samples,
      scores_of,
      config,
      num_rows=num_rows,
      num_leaves=num_leaves,
      reorder_times=_REORDER_TIMES,
    )
    searcher.state = _state_of(built)
    return searcher

  def save(self, folder: str) -> None:
    artifacts.gfile.makedirs(folder)
    if self.state:
      saved_models.save(
        self.state, folder, options=tf.saved_model.SaveOptions(namespace_whitelist=["Scann"])
      )

  @classmethod
  def load(
    cls, folder: str, embeddings: np.ndarray, *, widths: Sequence[dict], **settings
  ) -> "ScannSearcher":
    _scann_ops()  # registers the op that the SavedModel holds
    state = tf.saved_model.load(paths.literal(folder)) if settings["num_leaves"] else None
    return cls(embeddings, state, widths=[Width(**width) for width in widths], **settings)

  @tf.function(autograph=False, reduce_retracing=True)
  def _search(self, queries, num, leaves, reorder):
    # Inside a tf.function, the op keeps its searcher between calls; eager calls would rebuild it.
    built = _scann_ops().searcher_from_module(self.state)
    with tf.device("CPU"):
      return self.best(queries, self._candidates(built, queries, leaves, reorder), num)

  def _candidates(self, built, queries, leaves, reorder):
    """Returns the `reorder` passages with the best codes, as `best` wants them: [B, R] int32."""
    numbers, scores = built.search_batched_parallel(
      queries,
      final_num_neighbors=reorder,
      pre_reorder_num_neighbors=reorder,
      leaves_to_search=leaves,
    )
    # Rows with fewer candidates than the fullest one end with NaN.
    return tf.sort(tf.where(tf.math.is_nan(scores), self.num_rows, numbers), axis=1)


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

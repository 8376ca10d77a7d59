"""Flags shared by the jobs that make an index."""

import dataclasses
from collections.abc import Mapping

from absl import flags

from realm_tf.retrieval.index_config import (
  EMBEDDING_TYPES,
  ROW_TYPES,
  SEARCHERS,
  IndexConfig,
)


def define() -> None:
  """Defines the flags shared by the jobs that make an index."""
  flags.DEFINE_enum(
    "searcher", "exact", SEARCHERS, "The searcher; exact needs only the embeddings."
  )
  flags.DEFINE_enum(
    "embedding_type",
    IndexConfig.embedding_type,
    EMBEDDING_TYPES,
    "Type in which embeddings are stored and searched; float16 and bfloat16 take half the memory.",
  )
  flags.DEFINE_float(
    "recall",
    IndexConfig.recall,
    "The share of the exact best passages that a search should find; for all but exact.",
  )
  flags.DEFINE_integer(
    "num_leaves", None, "Partitions of the embeddings; the square root of their number by default."
  )
  flags.DEFINE_integer(
    "leaves_to_search", None, "Partitions searched for each query; by default chosen for --recall."
  )
  flags.DEFINE_integer(
    "reorder", None, "Candidates whose score is computed exactly; by default chosen for --recall."
  )
  flags.DEFINE_enum(
    "row_type",
    IndexConfig.row_type,
    ROW_TYPES,
    "Type of the numbers that --searcher=partitioned searches; bfloat16 takes twice the memory.",
  )
  flags.DEFINE_bool("mixed_precision", False, "Compute in bfloat16.")
  flags.DEFINE_integer("batch_size", 64, "Passages in a batch.")
  flags.DEFINE_bool("jit_compile", True, "Compile the tower with XLA, on a GPU.")


def config_of(args: flags.FlagValues, made: Mapping[str, object] | None = None) -> IndexConfig:
  """Returns the index config given by the flags of `define`.

  Args:
    args: the flags.
    made: the config of an earlier index, for the flags that are not given; None takes their
      defaults.
  """
  names = [field.name for field in dataclasses.fields(IndexConfig) if field.name in args]
  given = {name: getattr(args, name) for name in names if made is None or args[name].present}
  return IndexConfig(**{**(made or {}), **given})

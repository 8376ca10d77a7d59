"""Configuration of how an index is made and searched, as set by the jobs' flags."""

import dataclasses

from realm_tf.errors import UserError

SEARCHERS = ("exact", "partitioned", "scann")
ROW_TYPES = ("int8", "bfloat16")
EMBEDDING_TYPES = ("float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class IndexConfig:
  """Configuration of how an index is made and searched.

  Attributes:
    searcher: "exact", "partitioned" or "scann".
    embedding_type: type in which the embeddings are stored and searched: "float32", or "float16" or
      "bfloat16", which take half the memory. float16 is more precise; its largest number is 65,504.
    recall: for all but "exact", the wanted share of the exact best k passages that a search for k
      finds, at any k.
    num_leaves: number of partitions of the embeddings; None means the square root of the number of
      embeddings.
    leaves_to_search: partitions searched for a query. None means all for fewer than 100,000
      passages, and for more the fewest that give the wanted recall.
    reorder: candidates whose inner product is computed exactly, at least twice the number of
      requested passages. None means the fewest that give the wanted recall.
    row_type: type of the numbers that "partitioned" searches: "int8", or "bfloat16", which takes
      twice the memory and is more precise.
    dimensions_per_block: dimensions that share a code of ScaNN's asymmetric hashing.
    mixed_precision: whether embeddings are computed in bfloat16.

  Raises:
    UserError: a value is not valid.
  """

  searcher: str = "exact"
  embedding_type: str = "float32"
  recall: float = 0.98
  num_leaves: int | None = None
  leaves_to_search: int | None = None
  reorder: int | None = None
  row_type: str = "int8"
  dimensions_per_block: int = 2
  mixed_precision: bool = False

  def __post_init__(self):
    enums = (
      ("searcher", SEARCHERS),
      ("embedding_type", EMBEDDING_TYPES),
      ("row_type", ROW_TYPES),
    )
    for name, allowed in enums:
      if getattr(self, name) not in allowed:
        raise UserError(f"{name} is {getattr(self, name)!r}; use one of {', '.join(allowed)}.")
    if not 0 < self.recall <= 1:
      raise UserError(f"the wanted recall is {self.recall}; use a share above 0 and at most 1.")
    for name in ("num_leaves", "leaves_to_search", "reorder", "dimensions_per_block"):
      if getattr(self, name) is not None and getattr(self, name) < 1:
        raise UserError(f"{name} is {getattr(self, name)}; wanted at least 1.")
    if self.num_leaves and self.leaves_to_search and self.leaves_to_search > self.num_leaves:
      raise UserError(
        f"leaves_to_search is {self.leaves_to_search} of {self.num_leaves} leaves; lower it, or "
        "raise num_leaves."
      )

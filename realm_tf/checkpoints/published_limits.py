"""Limits on the sizes of a published checkpoint."""

from collections.abc import Mapping

from realm_tf.checkpoints.tensor_files import CheckpointError
from realm_tf.corpus import vocabularies

_LIMITS = {  # least and most value in a config; the most is several times any published value
  "vocab_size": (1, vocabularies.MAX_PIECES),
  "hidden_size": (1, 8192),
  "num_hidden_layers": (1, 100),
  "num_attention_heads": (1, 256),
  "intermediate_size": (1, 65_536),
  "max_position_embeddings": (8, 65_536),
  "type_vocab_size": (1, 1000),
  "retriever_proj_size": (1, 8192),
  "span_hidden_size": (1, 8192),
  "max_span_width": (1, 100),
  "reader_beam_size": (1, 1000),
  "reader_seq_len": (8, 65_536),
  "hidden_dropout_prob": (0.0, 0.9),
  "layer_norm_eps": (0.0, 1.0),
  "reader_layer_norm_eps": (0.0, 1.0),
}
_MAX_VALUES = 4_000_000_000
_SHOWN_CHARS = 80


def check_limits(config: Mapping, *, source: str) -> None:
  """Rejects sizes that no BERT has, before they are used.

  Args:
    config: values by the names of transformers' config.json; other names are ignored.
    source: origin of the config, for messages.

  Raises:
    CheckpointError: if a value is not a number, or is out of its limits.
  """
  for name, (least, most) in _LIMITS.items():
    value = config.get(name, least)
    is_number = type(value) is int or (type(value) is float and isinstance(least, float))
    if not is_number or not least <= value <= most:
      raise CheckpointError(
        f"{source!r} says {name}={shown(value)}; wanted a number from {least} to {most}."
      )


def values_of_encoder(sizes: Mapping, *, source: str) -> int:
  """Returns the number of values of a BERT of these sizes, except biases, norms and the like.

  Args:
    sizes: all of the sizes, named as in `check_limits` and within its limits.
    source: origin of the sizes, for messages.

  Raises:
    CheckpointError: if there are more values than any machine would train on.
  """
  hidden_size = sizes["hidden_size"]
  rows = sizes["vocab_size"] + sizes["max_position_embeddings"]
  per_layer = 4 * hidden_size * hidden_size + 2 * hidden_size * sizes["intermediate_size"]
  num_values = rows * hidden_size + sizes["num_hidden_layers"] * per_layer
  if num_values > _MAX_VALUES:
    raise CheckpointError(
      f"{source!r} is a BERT of {num_values:,} values; at most {_MAX_VALUES:,} are supported."
    )
  return num_values


def shown(value) -> str:
  """Formats a value from a file for messages: shortened, without control characters."""
  text = repr(value) if isinstance(value, str | int | float | bool | None) else type(value).__name__
  return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}.."

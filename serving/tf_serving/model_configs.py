"""Interprets a ModelServerConfig: models, the versions of each, and how they are loaded."""

import dataclasses
from collections.abc import Mapping, Sequence

from tensorflow_serving.config import model_server_config_pb2

from serving.tf_serving.status import invalid


@dataclasses.dataclass(frozen=True)
class Loading:
  """How versions are loaded.

  Attributes:
    tags: tags of the graph to load from a SavedModel.
    max_retries: how often a version that failed to load is retried while its files do not change.
    retry_secs: time before each retry.
  """

  tags: Sequence[str] = ("serve",)
  max_retries: int = 5
  retry_secs: float = 60.0


def checked(
  config: model_server_config_pb2.ModelServerConfig,
) -> dict[str, model_server_config_pb2.ModelConfig]:
  """Returns model name → its part of the config. Raises StatusError: INVALID_ARGUMENT."""
  if config.WhichOneof("config") != "model_config_list":
    raise invalid("the config has no model_config_list; nothing else is supported.")
  configs = {}
  for model in config.model_config_list.config:
    if model.name in configs:
      raise invalid(f"Illegal to list model {model.name} multiple times in config list")
    if not model.name or not model.base_path:
      raise invalid(
        f"a model needs a name and a base_path, got name {model.name!r}, base_path "
        f"{model.base_path!r}."
      )
    if "\0" in model.base_path:  # TensorFlow would read the path only up to there
      raise invalid(f"model {model.name!r} has a base_path with a NUL: {model.base_path!r}.")
    if not model.model_platform:
      raise invalid(
        "Illegal setting neither ModelServerConfig::model_type (deprecated) nor "
        "ModelServerConfig::model_platform."
      )
    if model.model_platform != "tensorflow":
      raise invalid(f"Model {model.name} requests unsupported platform {model.model_platform}")
    configs[model.name] = model
  return configs


def chosen(policy, found: Mapping[int, str]) -> list[int]:
  """Returns the versions that a ServableVersionPolicy selects from those found (newest first)."""
  choice = policy.WhichOneof("policy_choice")
  if choice == "all":
    return list(found)
  if choice == "specific":
    return [version for version in found if version in policy.specific.versions]
  return list(found)[: max(policy.latest.num_versions, 1)]

"""A loaded version of a model and its signatures, which can be run."""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import prometheus_client
import tensorflow as tf
import tensorflow_text  # noqa: F401  registers its ops
from tensorflow.core.protobuf import meta_graph_pb2, saved_model_pb2

from realm_tf.storage import integrity, paths
from serving.tf_serving.status import invalid, status_of

with contextlib.suppress(ImportError):
  from scann.scann_ops.py import scann_ops  # noqa: F401  registers its ops

DEFAULT_SIGNATURE = "serving_default"
SAVED_MODEL = "saved_model.pb"
LATENCY_BUCKETS = tuple(10 * 1.8**i for i in range(33))  # microseconds, as in TensorFlow Serving
_RUNTIME_LATENCY = prometheus_client.Histogram(
  ":tensorflow:serving:runtime_latency",
  "Wall time (in microseconds) in TensorFlow.",
  ["model_name", "API", "runtime"],
  buckets=LATENCY_BUCKETS,
)


class Signature:
  """One signature of a loaded SavedModel.

  Attributes:
    name: its key.
    inputs, outputs: name → TensorInfo.
    defaults: input name → TensorProto used if a request has none.
    batchable: False once a run has shown that its outputs cannot be split by rows.
  """

  def __init__(
    self, name: str, proto: meta_graph_pb2.SignatureDef, function: Callable, *, model_name: str
  ):
    self.name = name
    self.inputs = dict(sorted(proto.inputs.items()))
    self.outputs = dict(sorted(proto.outputs.items()))
    self.defaults = dict(proto.defaults)
    self.batchable = True
    self._function = function
    # "TF1" is TensorFlow Serving's label for this way to run a SavedModel; dashboards filter by it.
    self._latency = _RUNTIME_LATENCY.labels(model_name, "Predict", "TF1")

  def check(self, inputs: Mapping[str, np.ndarray]) -> None:
    """Checks the shapes of all inputs. Raises StatusError: INVALID_ARGUMENT."""
    for name, info in self.inputs.items():
      if info.tensor_shape.unknown_rank:
        continue
      wanted, got = [dim.size for dim in info.tensor_shape.dim], inputs[name].shape
      if len(wanted) != len(got) or any(w not in (-1, g) for w, g in zip(wanted, got, strict=True)):
        raise invalid(
          f'input "{name}" has shape {list(got)}; the signature wants {wanted} (-1: any size).'
        )

  def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Runs the signature.

    Args:
      inputs: name → array, all of the correct dtype and shape (see `check`); strings are arrays of
        bytes objects.

    Returns:
      Output name → array.

    Raises:
      StatusError: the model failed.
    """
    started = time.perf_counter()
    try:
      outputs = self._function(
        **{
          name: tf.convert_to_tensor(value, self.inputs[name].dtype)
          for name, value in inputs.items()
        }
      )
      # numpy() of a scalar string is bytes, from which np.asarray would strip trailing zeros.
      arrays = {
        name: np.asarray(value.numpy(), object if value.dtype == tf.string else None)
        for name, value in outputs.items()
      }
    except Exception as error:
      raise status_of(error) from error
    self._latency.observe((time.perf_counter() - started) * 1e6)
    return arrays


class Servable:
  """A loaded version of a model.

  Attributes:
    signatures: name → Signature, of those that can be run.
    signature_defs: name → SignatureDef, of all signatures.
    num_requests: requests that currently hold it; guarded by the lock of `Models`.
    retired: whether it is no longer given to new requests.
  """

  def __init__(self, name: str, version: int, path: str, *, tags: Sequence[str] = ("serve",)):
    """Loads the version; a servable written by serving.export must be unchanged.

    Raises:
      ArtifactError: a file is missing or damaged.
      OpError: the folder is not a SavedModel.
    """
    integrity.check_digests(path)
    self.name, self.version, self.path = name, version, path
    self._model = tf.saved_model.load(paths.literal(path), tags=tags)
    saved_model = saved_model_pb2.SavedModel()
    with tf.io.gfile.GFile(f"{path}/{SAVED_MODEL}", "rb") as file:
      saved_model.ParseFromString(file.read())
    (graph,) = (
      graph for graph in saved_model.meta_graphs if set(graph.meta_info_def.tags) == set(tags)
    )
    self.signature_defs = dict(graph.signature_def)
    # A second name for a function runs the first one, because TensorFlow would optimise it again,
    # which takes a second.
    bodies: dict[tuple, Callable] = {}
    self.signatures = {
      key: Signature(
        key, self.signature_defs[key], bodies.setdefault(_body(function), function), model_name=name
      )
      for key, function in self._model.signatures.items()
    }
    self.num_requests = 0
    self.retired = False


def _body(function) -> tuple:
  """Returns a key of what a signature's function computes, and from which variables."""
  definition = function.function_def
  nodes = tuple(node.SerializeToString(deterministic=True) for node in definition.node_def)
  return (
    nodes,
    str(function.structured_input_signature),
    str(sorted(definition.ret.items())),
    tuple(map(id, function.captured_inputs)),
  )

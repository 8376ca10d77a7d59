"""gRPC requests, and the codes with which TensorFlow Serving answers them, from its source code.

Files are those of tensorflow_serving/ in TensorFlow Serving's repository; "gRPC" is an answer of
the gRPC library, and "limit" a limit that TensorFlow Serving does not have.
"""

import random
from collections.abc import Callable
from typing import NamedTuple

import grpc
import numpy as np
import tensorflow as tf
from tensorflow.core.framework import tensor_pb2
from tensorflow_serving.apis import (
  get_model_metadata_pb2,
  get_model_status_pb2,
  model_management_pb2,
  predict_pb2,
)

from benchmarks.attack.rest_cases import MODEL

_PREDICT = "/tensorflow.serving.PredictionService/Predict"
_METADATA = "/tensorflow.serving.PredictionService/GetModelMetadata"
_STATUS = "/tensorflow.serving.ModelService/GetModelStatus"
_RELOAD = "/tensorflow.serving.ModelService/HandleReloadConfigRequest"
_UTIL = "servables/tensorflow/predict_util.cc"
_CORE = "model_servers/server_core.cc"
_STATUS_IMPL = "model_servers/get_model_status_impl.cc"
_METADATA_IMPL = "servables/tensorflow/get_model_metadata_impl.cc"
_GRPC = "gRPC"
_LIMIT = "limit"
C = grpc.StatusCode


class Call(NamedTuple):
  """A call: its method, and its request as bytes."""

  method: str
  request: bytes


class Case(NamedTuple):
  """A kind of call; see `rest_cases.Case`."""

  name: str
  source: str
  wanted: frozenset[grpc.StatusCode]
  make: Callable[[random.Random], Call]


def _predict(inputs: dict, *, outputs=(), **spec) -> Call:
  request = predict_pb2.PredictRequest(model_spec={"name": MODEL, **spec}, output_filter=outputs)
  for name, value in inputs.items():
    proto = value if isinstance(value, tensor_pb2.TensorProto) else tf.make_tensor_proto(value)
    request.inputs[name].CopyFrom(proto)
  return Call(_PREDICT, request.SerializeToString())


def _fixed(name: str, source: str, wanted: grpc.StatusCode, *calls: Call) -> Case:
  return Case(name, source, frozenset([wanted]), lambda rng: rng.choice(calls))


def _huge(*, dtype: int = 7, shape=(1 << 26,), **fields) -> tensor_pb2.TensorProto:
  dims = {"dim": [{"size": size} for size in shape]}
  return tensor_pb2.TensorProto(dtype=dtype, tensor_shape=dims, **fields)


def _right(rng: random.Random) -> Call:
  texts = [rng.randbytes(rng.randrange(40)) for _ in range(rng.randrange(1, 20))]
  if rng.random() < 0.5:
    return _predict({"text": texts})
  x = np.array([[rng.random(), rng.random()] for _ in texts], np.float32)
  return _predict({"x": x, "bias": np.ones(len(texts), np.float32)}, signature_name="affine")


def _mutated(rng: random.Random) -> Call:
  """Returns a valid request with some bytes changed or deleted."""
  call = _right(rng)
  body = bytearray(call.request)
  for _ in range(rng.randrange(1, 6)):
    at = rng.randrange(len(body))
    if rng.random() < 0.7:
      body[at] = rng.randrange(256)
    else:
      del body[at : at + rng.randrange(1, 8)]
    body = body or bytearray(b"\n")
  return Call(call.method, bytes(body))


def _no_message(rng: random.Random) -> Call:
  return Call(rng.choice([_PREDICT, _METADATA, _STATUS, _RELOAD]), b"\xff" * rng.randrange(1, 60))


def _status(**spec) -> Call:
  request = get_model_status_pb2.GetModelStatusRequest(model_spec=spec)
  return Call(_STATUS, request.SerializeToString())


def _metadata(*fields: str, **spec) -> Call:
  request = get_model_metadata_pb2.GetModelMetadataRequest(model_spec=spec, metadata_field=fields)
  return Call(_METADATA, request.SerializeToString())


def _reload(*models: dict) -> Call:
  config = {"model_config_list": {"config": models}} if models else {}
  request = model_management_pb2.ReloadConfigRequest(config=config)
  return Call(_RELOAD, request.SerializeToString())


_TEXT = {"text": ["a"]}

CASES = (
  Case("predict", _UTIL, frozenset([C.OK]), _right),
  _fixed("output filter", _UTIL, C.OK, _predict(_TEXT, outputs=["upper"])),
  _fixed("status", _STATUS_IMPL, C.OK, _status(name=MODEL)),
  _fixed("metadata", _METADATA_IMPL, C.OK, _metadata("signature_def", name=MODEL)),
  _fixed("no model spec", _CORE, C.INVALID_ARGUMENT, Call(_PREDICT, b""), Call(_STATUS, b"")),
  _fixed("no name", _CORE, C.INVALID_ARGUMENT, _predict(_TEXT, name="")),
  _fixed(
    "unknown model",
    _CORE,
    C.NOT_FOUND,
    _predict(_TEXT, name="nobody"),
    _predict(_TEXT, name="n" * 90_000),
    _predict(_TEXT, name="\x1b\n\0"),
    _status(name="nobody"),
  ),
  _fixed(
    "unknown version",
    _CORE,
    C.NOT_FOUND,
    *(_predict(_TEXT, version={"value": value}) for value in (-(1 << 63), -1, 0, 7, (1 << 63) - 1)),
  ),
  _fixed("unknown label", _CORE, C.INVALID_ARGUMENT, _predict(_TEXT, version_label="l" * 9000)),
  _fixed(
    "unknown signature", _UTIL, C.FAILED_PRECONDITION, _predict(_TEXT, signature_name="s" * 9000)
  ),
  _fixed(
    "other inputs",
    _UTIL,
    C.INVALID_ARGUMENT,
    _predict({}),
    _predict({"else": ["a"]}),
    _predict({"x" * 9000: ["a"]}),
    _predict({"text": ["a"], "else": ["a"]}),
  ),
  _fixed(
    "wrong type", _UTIL, C.INVALID_ARGUMENT, *(_predict({"text": [value]}) for value in (1, 1.5))
  ),
  _fixed(
    "wrong outputs",
    _UTIL,
    C.INVALID_ARGUMENT,
    _predict(_TEXT, outputs=["else"]),
    _predict(_TEXT, outputs=["upper", "upper"]),
  ),
  _fixed(
    "metadata field",
    _METADATA_IMPL,
    C.INVALID_ARGUMENT,
    _metadata(name=MODEL),
    _metadata("else", name=MODEL),
  ),
  _fixed(
    "reload",
    _CORE,
    C.INVALID_ARGUMENT,
    _reload(),
    _reload({"name": "a", "base_path": "/a"}),
    _reload({"name": "a", "base_path": "/a", "model_platform": "else"}),
    _reload(*[{"name": "a", "base_path": "/a", "model_platform": "tensorflow"}] * 2),
  ),
  _fixed(
    "unknown method",
    _GRPC,
    C.UNIMPLEMENTED,
    Call("/tensorflow.serving.PredictionService/Nothing", b""),
    Call("/nobody/Nothing", b"\xff"),
  ),
  Case("no message", _GRPC, frozenset([C.INTERNAL]), _no_message),
  _fixed(
    "huge tensor",
    _LIMIT,
    C.INVALID_ARGUMENT,
    _predict({"text": _huge()}),
    _predict({"text": _huge(string_val=[b"a"])}),
    _predict({"text": _huge(shape=(5000,), string_val=[b"a" * 9000])}),
    _predict({"x": _huge(dtype=9, shape=(1 << 62, 4), int64_val=[1])}, signature_name="any_rank"),
    _predict({"x": _huge(dtype=9, shape=(-5, -5), int64_val=[1])}, signature_name="any_rank"),
    _predict({"x": _huge(dtype=9, shape=(1,) * 70, int64_val=[1])}, signature_name="any_rank"),
  ),
  _fixed("too many rows", _LIMIT, C.INVALID_ARGUMENT, _predict({"text": ["a"] * 70_000})),
  _fixed("classify", _LIMIT, C.UNIMPLEMENTED, Call(_PREDICT.replace("Predict", "Classify"), b"")),
  Case(
    "mutated",
    _UTIL,
    frozenset([C.OK, C.INVALID_ARGUMENT, C.NOT_FOUND, C.FAILED_PRECONDITION, C.INTERNAL]),
    _mutated,
  ),
)

"""REST requests, and the codes with which TensorFlow Serving answers them, from its source code.

Files are those of tensorflow_serving/ in TensorFlow Serving's repository. The source is "limit" if
this server has a limit that TensorFlow Serving does not have.
"""

import gzip
import json
import random
import zlib
from collections.abc import Callable
from typing import NamedTuple

MODEL = "attacked"
PREDICT = f"/v1/models/{MODEL}:predict"
_API = "model_servers/http_rest_api_util.cc, http_rest_api_handler.cc"
_JSON = "util/json_tensor.cc"
_CORE = "model_servers/server_core.cc"
_BODY = "util/net_http/server/internal/evhttp_request.cc"
_LIMIT = "limit"


class Request(NamedTuple):
  """An HTTP request."""

  method: str
  path: str
  body: bytes = b""
  headers: tuple[tuple[str, str], ...] = ()


class Case(NamedTuple):
  """A kind of request.

  Attributes:
    name: name of the kind.
    source: file of TensorFlow Serving that decides on it.
    wanted: the correct codes.
    make: makes a request of the kind.
  """

  name: str
  source: str
  wanted: frozenset[int]
  make: Callable[[random.Random], Request]


def _post(body, *, path: str = PREDICT, **headers: str) -> Request:
  if not isinstance(body, bytes):
    body = body.encode() if isinstance(body, str) else json.dumps(body).encode()
  named = tuple((name.replace("_", "-"), value) for name, value in headers.items())
  return Request("POST", path, body, named)


def _fixed(name: str, source: str, wanted: int, *requests: Request) -> Case:
  return Case(name, source, frozenset([wanted]), lambda rng: rng.choice(requests))


def _text(rng: random.Random, most: int = 30) -> str:
  """Returns random characters, without halves of surrogate pairs."""
  codes = (rng.choice([rng.randrange(128), rng.randrange(0xD800), 0x1F600]) for _ in range(most))
  return "".join(map(chr, codes))[: rng.randrange(most + 1)]


def _rows(rng: random.Random) -> Request:
  return _post({"instances": [_text(rng) for _ in range(rng.randrange(1, 20))]})


def _affine(rng: random.Random) -> Request:
  rows = [
    {"x": [rng.random(), rng.randrange(100)], "bias": 0.5} for _ in range(rng.randrange(1, 9))
  ]
  return _post({"signature_name": "affine", "instances": rows})


def _columns(rng: random.Random) -> Request:
  values: list | int = rng.randrange(100)
  for _ in range(rng.randrange(8)):
    values = [values] * rng.randrange(1, 3)
  return _post({"signature_name": "any_rank", "inputs": values})


def _compressed(rng: random.Random) -> Request:
  body = _rows(rng).body
  name = rng.choice(["gzip", "deflate"])
  packed = gzip.compress(body) if name == "gzip" else zlib.compress(body)
  return _post(packed, Content_Encoding=name)


def _broken_compression(rng: random.Random) -> Request:
  request = _compressed(rng)
  kept = request.body[: rng.randrange(1, len(request.body) - 8)]
  return request._replace(body=kept)


def _deep(rng: random.Random) -> Request:
  depth = rng.choice([65, 66, 100, 300, 900, 5000])
  return _post(f'{{"signature_name": "any_rank", "inputs": {"[" * depth}1{"]" * depth}}}')


def _digits(rng: random.Random) -> str:
  return "9" * rng.choice([19, 20, 40, 400, 4301, 7000])


def _mutated(rng: random.Random) -> Request:
  """Returns a valid body with some bytes changed, duplicated or deleted."""
  body = bytearray(rng.choice([_rows, _affine, _columns])(rng).body)
  for _ in range(rng.randrange(1, 6)):
    at = rng.randrange(len(body))
    change = rng.randrange(3)
    if change == 0:
      body[at] = rng.randrange(256)
    elif change == 1:
      body[at:at] = body[at : at + rng.randrange(8)] or b"["
    else:
      del body[at : at + rng.randrange(1, 8)]
    body = body or bytearray(b"{")
  return _post(bytes(body))


def _bomb(rng: random.Random) -> Request:
  compressor = zlib.compressobj(9, wbits=31)
  step = b" " * (1 << 20)
  parts = [compressor.compress(step) for _ in range(rng.choice([80, 200]))]
  return _post(b"".join([*parts, compressor.flush()]), Content_Encoding="gzip")


def _wrong_path(rng: random.Random) -> Request:
  verb = rng.choice(
    [":delete", ":Predict2", "", "/", "/versions/x:predict", ":predict/x", "::predict"]
  )
  return _post({"instances": ["a"]}, path=f"/v1/models/{MODEL}{verb}")


_UNKNOWN_VERBS = [Request(method, PREDICT) for method in ("PUT", "DELETE", "PATCH", "GET")]

CASES = (
  Case("rows", _JSON, frozenset([200]), _rows),
  Case("named rows", _JSON, frozenset([200]), _affine),
  Case("columns", _JSON, frozenset([200]), _columns),
  Case("compressed", _BODY, frozenset([200]), _compressed),
  _fixed("base64", _JSON, 200, _post({"instances": [{"b64": "/wA="}, {"b64": "YQ"}]})),
  _fixed("status", _API, 200, Request("GET", f"/v1/models/{MODEL}")),
  _fixed("metadata", _API, 200, Request("GET", f"/v1/models/{MODEL}/metadata")),
  _fixed(
    "unknown model",
    _CORE,
    404,
    _post({"instances": ["a"]}, path="/v1/models/nobody:predict"),
    Request("GET", "/v1/models/nobody"),
    Request("GET", "/v1/models/%ff%00%1b"),
    Request("GET", "/v1/models/" + "n" * 7000),
  ),
  _fixed(
    "unknown version",
    _CORE,
    404,
    _post({"instances": ["a"]}, path=f"/v1/models/{MODEL}/versions/7:predict"),
    Request("GET", f"/v1/models/{MODEL}/versions/{(1 << 63) - 1}"),
  ),
  _fixed(
    "unknown label",
    _CORE,
    400,
    _post({"instances": ["a"]}, path=f"/v1/models/{MODEL}/labels/nobody:predict"),
  ),
  Case(
    "version too large",
    _API,
    frozenset([400]),
    lambda rng: Request("GET", f"/v1/models/{MODEL}/versions/{_digits(rng)}"),
  ),
  Case("malformed path", _API, frozenset([400]), _wrong_path),
  _fixed("other method", _API, 400, *_UNKNOWN_VERBS),
  _fixed("no model", _API, 400, Request("GET", "/v1/models")),
  _fixed("no document", _JSON, 400, _post(b"")),
  _fixed("no JSON", _JSON, 400, _post("{"), _post("[1,]"), _post(b"\x00"), _post("{'a': 1}")),
  _fixed("no object", _JSON, 400, _post("[]"), _post("1"), _post("null"), _post('"a"')),
  _fixed("no inputs", _JSON, 400, _post({}), _post({"signature_name": "affine"})),
  _fixed("both forms", _JSON, 400, _post({"instances": ["a"], "inputs": ["a"]})),
  _fixed("no rows", _JSON, 400, _post({"instances": []}), _post({"instances": {}})),
  _fixed("signature name", _JSON, 400, _post({"signature_name": ["a"], "instances": ["a"]})),
  _fixed("unknown signature", _API, 400, _post({"signature_name": "x" * 9000, "instances": ["a"]})),
  _fixed(
    "half a surrogate pair",
    _JSON,
    400,
    _post('{"instances": ["\\ud800"]}'),
    _post('{"signature_name": "\\udfff", "instances": ["a"]}'),
    _post('{"instances": [{"\\ud812": "a"}]}'),
  ),
  Case("too deep", _JSON, frozenset([400]), _deep),
  _fixed(
    "wrong type",
    _JSON,
    400,
    *(_post({"instances": [value]}) for value in (1, 1.5, None, True, {"b64": 1}, {"b": "YQ"})),
    _post({"signature_name": "any_rank", "inputs": 1.5}),
    _post({"signature_name": "any_rank", "inputs": "1"}),
    _post({"signature_name": "any_rank", "inputs": 1 << 63}),
  ),
  _fixed("bad base64", _JSON, 400, _post({"instances": [{"b64": "*"}]})),
  _fixed(
    "lossy number",
    _JSON,
    400,
    *(
      _post({"signature_name": "affine", "inputs": {"x": [[value, 1]], "bias": [1]}})
      for value in (1e39, 1 << 24, 10**400)
    ),
  ),
  _fixed(
    "ragged",
    _JSON,
    400,
    _post({"instances": ["a", ["b"]]}),
    _post({"signature_name": "affine", "inputs": {"x": [[1, 2], [3]], "bias": [1, 2]}}),
    _post({"signature_name": "any_rank", "inputs": [[1], 2]}),
  ),
  _fixed(
    "other keys",
    _JSON,
    400,
    _post({"instances": [{"else": "a"}]}),
    _post({"signature_name": "affine", "instances": [{"x": [1, 2]}]}),
    _post({"signature_name": "affine", "instances": [1]}),
    _post({"instances": ["a", {"text": "b"}]}),
  ),
  Case("broken compression", _BODY, frozenset([400]), _broken_compression),
  _fixed("classify", _LIMIT, 501, _post({}, path=f"/v1/models/{MODEL}:classify")),
  Case("inflates", _LIMIT, frozenset([413, 429]), _bomb),
  _fixed("too many rows", _LIMIT, 400, _post({"instances": ["a"] * 70_000})),
  Case("mutated", _JSON, frozenset([200, 400]), _mutated),
)

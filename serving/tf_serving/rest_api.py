"""TensorFlow Serving's REST API.

It supports predict with "instances" (rows) or "inputs" (columns), status, metadata and metrics.
Paths and codes are as in TensorFlow Serving (model_servers/http_rest_api_util.cc, http_server.cc).
"""

import asyncio
import contextlib
import functools
import json
import math
import re
import threading
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import grpc
import prometheus_client
from aiohttp import web
from google.protobuf import json_format
from tensorflow_serving.apis import get_model_metadata_pb2, get_model_status_pb2, model_pb2

from serving.tf_serving import http_log, json_requests, json_responses, version_folders
from serving.tf_serving.batching import Arrays, too_late
from serving.tf_serving.prediction_service import Predictor, model_metadata, model_status, recorded
from serving.tf_serving.request_bodies import Bodies, Body, TooLarge, TooSlow
from serving.tf_serving.servables import DEFAULT_SIGNATURE, Signature
from serving.tf_serving.status import StatusError, invalid, shortened
from serving.tf_serving.workers import Workers

_MODEL = (
  r"(?i)/v1/models/(?P<name>[^/:]+)"
  r"(?:/versions/(?P<version>[0-9]+)|/labels/(?P<label>[^/:]+))?"
)
_POST = re.compile(_MODEL + r":(?P<verb>classify|regress|predict)")
_GET = re.compile(_MODEL + r"(?P<verb>/metadata)?")
# Any other code becomes 500.
_HTTP_STATUS = {
  grpc.StatusCode.CANCELLED: 499,
  grpc.StatusCode.INVALID_ARGUMENT: 400,
  grpc.StatusCode.DEADLINE_EXCEEDED: 504,
  grpc.StatusCode.NOT_FOUND: 404,
  grpc.StatusCode.ALREADY_EXISTS: 409,
  grpc.StatusCode.PERMISSION_DENIED: 403,
  grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
  grpc.StatusCode.FAILED_PRECONDITION: 400,
  grpc.StatusCode.ABORTED: 409,
  grpc.StatusCode.OUT_OF_RANGE: 400,
  grpc.StatusCode.UNIMPLEMENTED: 501,
  grpc.StatusCode.UNAVAILABLE: 503,
  grpc.StatusCode.UNAUTHENTICATED: 401,
}
_CORS_HEADERS = {
  "Access-Control-Allow-Origin": "*",
  "Access-Control-Allow-Methods": "POST, GET",
  "Access-Control-Allow-Headers": "Content-Type",
}
_STATUS_OF_BODIES = {TooLarge: 413, TooSlow: 408}
# Larger bodies are parsed, and larger responses written, one at a time: their objects take many
# times their size, and the work holds Python's interpreter, so that with several at once small
# requests would wait for all of them.
_LARGE_BODY_BYTES = 1 << 17
_LARGE_OUTPUT_VALUES = 1 << 13
# For a client that is still sending when its answer is ready; then its connection is closed.
_LINGERING_SECS = 2.0
_MAX_IDLE_SECS = 3600.0  # of a connection, where requests may take any time


# ============================================================================================= HTTP


class _Parsed(NamedTuple):
  """A predict request: signature, inputs, and whether they were given as rows."""

  signature: Signature
  inputs: Arrays
  by_row: bool


class RestApi:
  """The handler of the HTTP server; requests run in its own threads."""

  def __init__(
    self,
    predictor: Predictor,
    *,
    timeout_secs: float,
    num_threads: int,
    max_waiting: int,
    max_request_bytes: int,
    max_bytes_in_work: int,
    metrics_path: str | None,
    cors: bool = False,
  ):
    """Creates the handler; see `runner`.

    Args:
      predictor: answers the requests.
      timeout_secs: time limit for reading and answering a request; 0 for none.
      num_threads: requests processed concurrently.
      max_waiting: requests that may wait for a thread; any more are rejected.
      max_request_bytes: maximum size of an inflated body.
      max_bytes_in_work: maximum total size of the bodies of all requests in progress.
      metrics_path: path of the metrics; None for no metrics.
      cors: whether a browser may use the answers in pages of other origins.
    """
    self._predictor = predictor
    self._timeout_secs = timeout_secs or math.inf
    self._workers = Workers(num_threads, max_waiting=max_waiting, name="rest")
    self._bodies = Bodies(max_bytes=max_request_bytes, max_total_bytes=max_bytes_in_work)
    self._large_work = threading.Semaphore(1)
    self._metrics_path = metrics_path
    self._headers = _CORS_HEADERS if cors else {}

  def runner(self, *, shutdown_secs: float) -> web.AppRunner:
    """Returns the runner that serves it. At cleanup, requests may take another `shutdown_secs`."""
    http_log.leave_out_strangers()
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", self._handle)
    # aiohttp closes connections that are idle, or do not complete their headers, for the keep-alive
    # time.
    return web.AppRunner(
      application,
      access_log=None,
      shutdown_timeout=shutdown_secs,
      lingering_time=_LINGERING_SECS,
      auto_decompress=False,  # `Body` does, with a limit
      keepalive_timeout=min(self._timeout_secs, _MAX_IDLE_SECS),
    )

  async def _handle(self, request: web.Request) -> web.StreamResponse:
    path = request.rel_url.raw_path
    if path == self._metrics_path:
      return web.Response(body=metrics_page(), headers={"Content-Type": "text/plain"})
    if not re.match("(?i)/v1/", path):
      text = shortened(f"{path} was not found; see /v1/models/NAME.")
      return web.Response(status=404, text=f"{text}\n")
    if request.method == "OPTIONS":  # a browser's preflight request
      return web.Response(
        status=200 if re.match("https?://", request.headers.get("Origin", "")) else 400,
        headers=self._headers,
      )
    return await self._send(request, await self._response(request, path))

  async def _response(self, request: web.Request, path: str) -> web.Response:
    deadline = time.monotonic() + self._timeout_secs
    read_by = asyncio.get_running_loop().time() + self._timeout_secs
    status, keep = 200, False
    try:
      async with self._bodies.hold(request, read_by) as body:
        keep = True
        text = await self._answer(request.method, path, body, deadline)
    except StatusError as error:
      status = _STATUS_OF_BODIES.get(type(error)) or _HTTP_STATUS.get(error.code, 500)
      text = _error_text(error.message)
    response = web.Response(
      status=status,
      # Strings that are not UTF-8 are sent as raw bytes.
      body=text.encode(errors="surrogateescape"),
      headers={"Content-Type": "application/json", **self._headers},
    )
    if not keep:  # the rest of the body would be read as another request
      response.force_close()
    return response

  async def _send(self, request: web.Request, response: web.Response) -> web.Response:
    """Sends a response; closes the connection if the client does not read it in time."""
    limit = self._timeout_secs if self._timeout_secs < math.inf else None
    try:
      async with asyncio.timeout(limit):
        await response.prepare(request)
        await response.write_eof()
    except TimeoutError:
      if request.transport:
        request.transport.abort()
    return response

  async def _answer(self, method: str, path: str, body: Body, deadline: float) -> str:
    pattern = {"POST": _POST, "GET": _GET}.get(method)
    match = pattern and pattern.fullmatch(path)
    if not match:
      if method == "GET" and path.rstrip("/").lower() == "/v1/models":
        raise invalid("Missing model name in request.")
      raise invalid(f"Malformed request: {method} {path}")
    spec = _model_spec(match)
    if method == "GET":
      return self._metadata(spec) if match["verb"] else self._status(spec)
    with recorded(self._predictor.models, spec.name, match["verb"].lower(), "REST"):
      if match["verb"].lower() != "predict":
        raise StatusError(
          grpc.StatusCode.UNIMPLEMENTED,
          f"this server does not support {match['verb']}; use predict.",
        )
      return await self._workers.run(
        functools.partial(self._predict, spec, body, deadline), self._timeout_secs
      )

  def _predict(self, spec: model_pb2.ModelSpec, body: Body, deadline: float) -> str:
    if time.monotonic() >= deadline:
      raise too_late()
    content = body.inflated(deadline)
    with self._predictor.models.hold(spec) as servable:
      with self._turn(deadline, large=len(content) > _LARGE_BODY_BYTES):
        parsed = self._parse(content, servable.signatures, deadline)
      outputs = self._predictor.run(parsed.signature, parsed.inputs, deadline)
    num_values = sum(array.size for array in outputs.values())
    with self._turn(deadline, large=num_values > _LARGE_OUTPUT_VALUES):
      if parsed.by_row:
        return json_responses.write_rows(outputs)
      return json_responses.write_columns(outputs)

  @contextlib.contextmanager
  def _turn(self, deadline: float, *, large: bool) -> Iterator[None]:
    """Lets one piece of large work run at a time; small work runs at once. Raises StatusError."""
    if not large:
      yield
      return
    wait_secs = min(deadline - time.monotonic(), threading.TIMEOUT_MAX)
    if wait_secs <= 0 or not self._large_work.acquire(timeout=wait_secs):
      raise too_late()
    try:
      yield
    finally:
      self._large_work.release()

  def _parse(self, content: bytes, signatures: Mapping[str, Signature], deadline: float) -> _Parsed:
    """Parses a request into its signature and inputs. Raises StatusError."""
    request = json_requests.parse(content)
    name = request.get("signature_name", "")
    if not isinstance(name, str):
      raise invalid(
        f"JSON Value: {json_requests.shown(request)} not formatted correctly. 'signature_name' key "
        "must be a string value."
      )
    name = name or DEFAULT_SIGNATURE
    signature = signatures.get(name)
    if signature is None:
      raise invalid(f'Serving signature name: "{name}" not found in signature def')
    by_row, inputs = json_requests.read_inputs(
      request, signature.inputs, deadline=deadline, max_rows=self._predictor.max_rows
    )
    return _Parsed(signature, inputs, by_row)

  def _status(self, spec: model_pb2.ModelSpec) -> str:
    # Probes interpret 200 as ready, since TensorFlow Serving listens only then.
    self._predictor.models.check_started(spec.name)
    response = model_status(
      self._predictor.models, get_model_status_pb2.GetModelStatusRequest(model_spec=spec)
    )
    return json.dumps(_dict(response), indent=1)

  def _metadata(self, spec: model_pb2.ModelSpec) -> str:
    response = model_metadata(
      self._predictor.models,
      get_model_metadata_pb2.GetModelMetadataRequest(
        model_spec=spec, metadata_field=["signature_def"]
      ),
    )
    signatures = get_model_metadata_pb2.SignatureDefMap()
    response.metadata["signature_def"].Unpack(signatures)
    return json.dumps(
      {"model_spec": _dict(response.model_spec), "metadata": {"signature_def": _dict(signatures)}},
      indent=1,
    )


def metrics_page() -> bytes:
  """Returns all metrics in Prometheus' text format."""
  # The library enforces the suffix; TensorFlow Serving has none.
  return prometheus_client.generate_latest().replace(b":request_count_total", b":request_count")


def _model_spec(match: re.Match) -> model_pb2.ModelSpec:
  spec = model_pb2.ModelSpec(name=_unquoted(match["name"]))
  if match["version"]:
    version = version_folders.version_of(match["version"])
    if version is None:
      raise invalid(f"Failed to convert version: {match['version']} to numeric.")
    spec.version.value = version
  if match["label"]:
    spec.version_label = _unquoted(match["label"])
  return spec


def _dict(message) -> dict:
  return json_format.MessageToDict(
    message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
  )


def _unquoted(text: str) -> str:
  """Decodes a part of a path, with U+FFFD in place of invalid UTF-8."""
  return urllib.parse.unquote(text).encode(errors="surrogateescape").decode(errors="replace")


def _error_text(message: str) -> str:
  return json.dumps({"error": shortened(message)}, indent=4, ensure_ascii=False)

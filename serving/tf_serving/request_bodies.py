"""Reads bodies of HTTP requests, and limits their arrival time and size."""

import asyncio
import contextlib
import math
import threading
import time
import zlib
from collections.abc import AsyncIterator

import grpc
from aiohttp import web

from serving.tf_serving.batching import too_late
from serving.tf_serving.status import StatusError, invalid

# A body up to this size does not count against the total: questions are answered, however many
# large bodies are in progress.
_SMALL_BYTES = 64 << 10
_STEP_BYTES = 1 << 20  # inflated at a time
_WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}  # of zlib, by Content-Encoding


class TooLarge(StatusError):
  """Raised if a body is larger than a request may be."""

  def __init__(self):
    super().__init__(
      grpc.StatusCode.RESOURCE_EXHAUSTED, "the request is too large (--max_request_bytes)."
    )


class TooSlow(StatusError):
  """Raised if a body has not arrived in time."""

  def __init__(self):
    super().__init__(
      grpc.StatusCode.DEADLINE_EXCEEDED,
      "the request did not arrive in time (--rest_api_timeout_in_ms).",
    )


class Bodies:
  """All bodies in progress, from their first byte to their answer."""

  def __init__(self, *, max_bytes: int, max_total_bytes: int):
    """Args: maximum bytes of one inflated body, and of all bodies in progress together."""
    self._max_bytes = max_bytes
    self._max_total_bytes = max_total_bytes
    self._total_bytes = 0
    self._lock = threading.Lock()

  @contextlib.asynccontextmanager
  async def hold(self, request: web.Request, deadline: float) -> AsyncIterator["Body"]:
    """Reads the body of a request, and counts it until the end of the `with` block.

    Args:
      request: the request; aiohttp must not decompress its body.
      deadline: in the time of asyncio's clock.

    Raises:
      TooLarge, TooSlow: the body is too large or too slow.
      StatusError: RESOURCE_EXHAUSTED if all bodies together are too large; INVALID_ARGUMENT.
    """
    body = Body(self, request.headers.get("Content-Encoding", "").strip().lower())
    try:
      await self._read(request, body, deadline)
      yield body
    finally:
      with self._lock:
        self._total_bytes -= body.counted_bytes

  async def _read(self, request: web.Request, body: "Body", deadline: float) -> None:
    if (request.content_length or 0) > self._max_bytes:
      raise TooLarge
    try:
      async with asyncio.timeout_at(deadline if deadline < math.inf else None):
        async for chunk in request.content.iter_any():
          body.content += chunk
          self.count(body, len(body.content))
    except TimeoutError:
      raise TooSlow from None
    except web.RequestPayloadError as error:
      raise invalid(f"the body cannot be read: {error}") from error

  def count(self, body: "Body", num_bytes: int) -> None:
    """Updates the size of a body. Raises TooLarge, or StatusError: RESOURCE_EXHAUSTED."""
    if num_bytes > self._max_bytes:
      raise TooLarge
    if num_bytes <= _SMALL_BYTES:
      return
    with self._lock:
      more = num_bytes - body.counted_bytes
      if self._total_bytes + more > self._max_total_bytes:
        raise StatusError(
          grpc.StatusCode.RESOURCE_EXHAUSTED,
          f"the requests in progress hold {self._total_bytes} bytes; try again later, or send less "
          "(--max_request_bytes_in_work).",
        )
      self._total_bytes += more
      body.counted_bytes = num_bytes


class Body:
  """A body as it was sent; `inflated` returns its decoded content."""

  def __init__(self, bodies: Bodies, encoding: str):
    self.content = bytearray()
    self.counted_bytes = 0
    self._bodies = bodies
    self._encoding = encoding

  def inflated(self, deadline: float) -> bytes:
    """Returns the body decoded according to its Content-Encoding.

    A small body can inflate to gigabytes, so it is inflated and counted step by step, in the thread
    that answers the request.

    Args:
      deadline: in time.monotonic().

    Raises:
      TooLarge: the body is larger than a request may be.
      StatusError: INVALID_ARGUMENT; RESOURCE_EXHAUSTED; DEADLINE_EXCEEDED.
    """
    if self._encoding in ("", "identity") or not self.content:
      return bytes(self.content)
    if self._encoding not in _WINDOW_BITS:
      known = ", ".join(_WINDOW_BITS)
      raise invalid(f"Content-Encoding {self._encoding!r} is not supported; use one of {known}.")
    decompressor = zlib.decompressobj(self._window_bits())
    inflated = bytearray()
    rest = bytes(self.content)
    try:
      while rest and not decompressor.eof:
        if time.monotonic() >= deadline:
          raise too_late()
        inflated += decompressor.decompress(rest, _STEP_BYTES)
        rest = decompressor.unconsumed_tail
        self._bodies.count(self, len(self.content) + len(inflated))
    except zlib.error as error:
      raise invalid(f"the body is not valid {self._encoding}: {error}") from error
    if not decompressor.eof or decompressor.unused_data:
      words = "has data after its end" if decompressor.eof else "is truncated"
      raise invalid(f"the body is not valid {self._encoding}: it {words}.")
    return bytes(inflated)

  def _window_bits(self) -> int:
    """Returns zlib's window bits; some clients send "deflate" without the header checked here."""
    if self._encoding == "deflate" and self.content[0] & 0xF != 8:
      return -_WINDOW_BITS["deflate"]
    return _WINDOW_BITS[self._encoding]

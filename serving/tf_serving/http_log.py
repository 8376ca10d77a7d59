"""Filters aiohttp's log, so that arbitrary clients cannot fill it."""

import logging

from aiohttp import http_exceptions

LOGGER = logging.getLogger("aiohttp.server")


def leave_out_strangers() -> None:
  """Omits malformed and aborted requests from the log: each would add a traceback."""
  LOGGER.addFilter(_is_ours)


def _is_ours(record: logging.LogRecord) -> bool:
  error = record.exc_info[1] if record.exc_info else None
  return not isinstance(error, (http_exceptions.HttpProcessingError, ConnectionError))

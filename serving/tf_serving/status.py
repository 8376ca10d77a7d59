"""The status that a client receives if a request fails: a canonical code and a message."""

import re

import grpc
import tensorflow as tf
from tensorflow.core.framework import types_pb2

_CODES = {code.value[0]: code for code in grpc.StatusCode}
# Limit of an error message: errors echo parts of requests, and gRPC drops a call whose trailing
# metadata exceed 8 KB.
_MAX_MESSAGE_BYTES = 1024


class StatusError(Exception):
  """An error to send to a client: a canonical code and a message."""

  def __init__(self, code: grpc.StatusCode, message: str):
    super().__init__(f"{code.name}: {message}")
    self.code = code
    self.message = message


def invalid(message: str) -> StatusError:
  return StatusError(grpc.StatusCode.INVALID_ARGUMENT, message)


def status_of(error: Exception) -> StatusError:
  """Returns the status for any exception that TensorFlow raises."""
  if isinstance(error, StatusError):
    return error
  if isinstance(error, tf.errors.OpError):
    # Removes what Python adds to the message: the place where the op was defined, which is unknown
    # for a loaded model, and the function.
    message = error.message.rpartition("<stack traces unavailable>\n")[2]
    return StatusError(
      _CODES.get(error.error_code, grpc.StatusCode.UNKNOWN), re.sub(r" \[Op:\w+\]$", "", message)
    )
  code = (
    grpc.StatusCode.NOT_FOUND if isinstance(error, FileNotFoundError) else grpc.StatusCode.INTERNAL
  )
  return StatusError(code, f"{type(error).__name__}: {error}")


def type_name(dtype: int) -> str:
  """Returns TensorFlow's name of a DataType: float, int32, string."""
  return types_pb2.DataType.Name(dtype).removeprefix("DT_").lower()


def shortened(message: str) -> str:
  """Shortens a message for sending: valid UTF-8 of at most 1 kB."""
  encoded = message.encode(errors="replace")
  if len(encoded) <= _MAX_MESSAGE_BYTES:
    return encoded.decode()
  return f"{encoded[: _MAX_MESSAGE_BYTES - 3].decode(errors='ignore')}..."

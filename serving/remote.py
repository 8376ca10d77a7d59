"""A client of a servable over gRPC, with readable errors. Does not need TensorFlow."""

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import grpc
import numpy as np

from realm_tf import errors
from serving import results, signatures
from serving.tf_serving import predict_protocol

_MAX_MESSAGE_BYTES = 64 << 20
_CHANNEL = {
  "grpc.max_receive_message_length": _MAX_MESSAGE_BYTES,
  "grpc.enable_retries": 0,
  # With the defaults, a server that comes up may be noticed only half a minute later.
  "grpc.initial_reconnect_backoff_ms": 200,
  "grpc.max_reconnect_backoff_ms": 500,
  "grpc.min_reconnect_backoff_ms": 5000,
}
_LOOK_SECS = 0.5  # between two calls of a server that is not ready
_STATUS_SECS = 5.0  # for finding out why there is no answer
TIMEOUT_SECS = 60.0


class ClientError(Exception):
  """An error for the user: what went wrong and what to do."""


class _State(NamedTuple):
  """The state of a version, by `predict_protocol.STATES`, and why it could not be loaded."""

  name: str
  error: str


@dataclasses.dataclass(frozen=True)
class _Reason:
  """Why a call failed: a keyword, a sentence, and whether the cause may be temporary."""

  kind: str
  words: str
  may_pass: bool = False


class Client:
  """A client of a servable over gRPC.

  Args:
    server: host:port.
    model_name: the name of the model on the server.
    version, label: number or label of a version; the newest if neither is given.
    timeout_secs: time limit of a call, including the wait for a server that is not ready.
  """

  def __init__(
    self,
    server: str,
    *,
    model_name: str = signatures.MODEL_NAME,
    version: int | None = None,
    label: str | None = None,
    timeout_secs: float = TIMEOUT_SECS,
  ):
    self.server, self.model_name, self.version, self.label, self.timeout_secs = (
      server,
      model_name,
      version,
      label,
      timeout_secs,
    )
    channel = grpc.insecure_channel(server, options=list(_CHANNEL.items()))
    self._predict = channel.unary_unary(
      predict_protocol.METHOD,
      request_serializer=predict_protocol.PredictRequest.SerializeToString,
      response_deserializer=predict_protocol.PredictResponse.FromString,
    )
    self._status = channel.unary_unary(
      predict_protocol.STATUS_METHOD,
      request_serializer=predict_protocol.StatusRequest.SerializeToString,
      response_deserializer=predict_protocol.StatusResponse.FromString,
    )

  def predict(self, signature: str, inputs: Mapping[str, Sequence]) -> dict[str, np.ndarray]:
    """Calls a signature: from input name → values to output name → values.

    Waits for a server that is not listening yet or is still loading the model, and prints what it
    is waiting for on standard error.

    Raises:
      ClientError: there is no such server, model, version or signature, the time limit is exceeded,
        the request or response is too large, or the response is malformed.
    """
    request = predict_protocol.PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = self.model_name, signature
    if self.version is not None:
      request.model_spec.version.value = self.version
    if self.label is not None:
      request.model_spec.version_label = self.label
    for name, values in inputs.items():
      request.inputs.add(key=name, value=predict_protocol.to_tensor(values))
    deadline, told = time.monotonic() + self.timeout_secs, set()
    while True:
      try:
        response = self._predict(request, timeout=max(deadline - time.monotonic(), 1e-3))
        return {output.key: predict_protocol.to_array(output.value) for output in response.outputs}
      except grpc.RpcError as error:
        reason = self._explain(error)
        if not reason.may_pass or time.monotonic() + _LOOK_SECS > deadline:
          late = (
            f" Gave up after {self.timeout_secs:g} s; to wait longer, set --timeout_secs."
            if reason.may_pass
            else ""
          )
          raise ClientError(
            f"{self.server}: {reason.words}{late}\n  {error.code().name}: {error.details()}"
          ) from error
        if reason.kind not in told:
          print(
            errors.plain(
              f"{self.server}: {reason.words} Waiting for at most "
              f"{deadline - time.monotonic():.0f} s .."
            ),
            file=sys.stderr,
            flush=True,
          )
        told.add(reason.kind)
        time.sleep(_LOOK_SECS)
      except ValueError as error:
        raise ClientError(
          f"{self.server} sent a response that this client cannot read: {error}"
        ) from error

  def _explain(self, error: grpc.RpcError) -> _Reason:
    """Explains a failed call in words, and decides whether to wait."""
    codes = grpc.StatusCode
    if error.code() in (codes.UNAVAILABLE, codes.NOT_FOUND):
      return self._explain_missing(error)
    return _Reason(
      error.code().name,
      {
        codes.DEADLINE_EXCEEDED: (
          f"no answer within {self.timeout_secs:g} s. Try again, ask fewer questions at once "
          "(--batch_size), or wait longer (--timeout_secs)."
        ),
        codes.RESOURCE_EXHAUSTED: (
          "the question or the answer is too large, or the server is overloaded. Ask fewer or "
          "shorter questions at once (--batch_size)."
        ),
      }.get(error.code(), f"{self._model()} refused the call."),
    )

  def _explain_missing(self, error: grpc.RpcError) -> _Reason:
    """Explains a missing server or model, by asking the server for the states of the versions."""
    not_found = error.code() == grpc.StatusCode.NOT_FOUND
    states = self._states()
    if isinstance(states, grpc.RpcError):
      if "http1.x" in error.details():
        return _Reason("http", f"that is an HTTP port; gRPC is usually at {signatures.GRPC_PORT}.")
      if not_found:
        names = (
          dict(states.trailing_metadata() or ())
          .get(predict_protocol.MODELS_METADATA, b"")
          .decode(errors="replace")
        )
        there = f" Models there: {names}." if names else ""
        return _Reason("model", f"it has no {self._model()}.{there} Give another --model_name.")
      if states.code() == grpc.StatusCode.UNAVAILABLE:
        return _Reason(
          "listens",
          f"nothing answers there. Is the server running, and is this its gRPC port (usually "
          f"{signatures.GRPC_PORT}; {signatures.REST_PORT} is REST)?",
          may_pass=True,
        )
      return _Reason("ready", f"{self._model()} is not ready.", may_pass=True)
    asked = {version: state for version, state in states.items() if self.version in (None, version)}
    if any(state.name in ("START", "LOADING") for state in asked.values()):
      return _Reason("loading", f"{self._model()} is still being loaded.", may_pass=True)
    if failed := [
      f"version {version}: {state.error}" for version, state in asked.items() if state.error
    ]:
      if not any(state.name == "AVAILABLE" for state in asked.values()):
        return _Reason("failed", f"{self._model()} could not be loaded there; {'; '.join(failed)}.")
    if not_found:
      there = ", ".join(f"{version} ({state.name.lower()})" for version, state in states.items())
      return _Reason(
        "version",
        f"it has no {self._model()}. Versions there: {there}. Give another --version or --label.",
      )
    return _Reason("ready", f"{self._model()} is not ready.", may_pass=True)

  def _states(self) -> Mapping[int, _State] | grpc.RpcError:
    """Returns the states of the model's versions, or why the server reports none."""
    request = predict_protocol.StatusRequest()
    request.model_spec.name = self.model_name
    try:
      response = self._status(request, timeout=min(self.timeout_secs, _STATUS_SECS))
    except grpc.RpcError as error:
      return error
    return {
      one.version: _State(
        predict_protocol.STATES.get(one.state, "UNKNOWN"), one.status.error_message
      )
      for one in response.model_version_status
    }

  def _model(self) -> str:
    chosen = [("version", self.version), ("label", self.label)]
    return ", ".join(
      [
        f"model {self.model_name!r}",
        *(f"{what} {value!r}" for what, value in chosen if value is not None),
      ]
    )

  def answer(self, questions: Sequence[str]) -> list[results.Answers]:
    """Answers a batch of questions. Raises ClientError."""
    rows = self._rows(signatures.ANSWER, questions)
    return [
      results.answers_of(question, row) for question, row in zip(questions, rows, strict=True)
    ]

  def fill_mask(self, texts: Sequence[str]) -> list[results.Filled]:
    """Fills a batch of texts with [MASK]. Raises ClientError."""
    rows = self._rows(signatures.FILL_MASK, texts)
    return [results.filled_of(text, row) for text, row in zip(texts, rows, strict=True)]

  def _rows(self, signature: signatures.Signature, texts: Sequence[str]) -> list[dict[str, list]]:
    """Returns the outputs of a call, a dictionary for each text."""
    outputs = self.predict(signature.name, {signature.inputs[0].name: texts})
    names = [field.name for field in signature.outputs]
    if missing := [name for name in names if name not in outputs]:
      raise ClientError(
        f"{self._model()} at {self.server} returned no {', '.join(missing)}: it was not exported "
        "by serving.export."
      )
    columns = [outputs[name].tolist() for name in names]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]

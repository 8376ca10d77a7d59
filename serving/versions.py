"""Which versions of which models are served: base paths watched, versions loaded, warmed up, labelled, swapped and unloaded.

As in TensorFlow Serving, M/<integer>/ is a version. A new one is loaded and warmed up beside the old one, takes over at once, and
the old one goes when its last request has been answered. A broken version never replaces a good one; it is tried again some
times, and whenever its files have changed. States, codes and messages are TensorFlow Serving's, with one difference: this server
listens while it loads its first versions, and until then it answers UNAVAILABLE and says what it waits for.
"""

import contextlib
import dataclasses
import gc
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import grpc
import numpy as np
import prometheus_client
import tensorflow as tf
import tensorflow_text  # noqa: F401  registers its ops
from absl import logging
from tensorflow.core.framework import types_pb2
from tensorflow.core.protobuf import meta_graph_pb2, saved_model_pb2
from tensorflow_serving.apis import get_model_status_pb2, model_pb2
from tensorflow_serving.config import model_server_config_pb2

from realm_tf import paths

with contextlib.suppress(ImportError):
  from scann.scann_ops.py import scann_ops  # noqa: F401  registers its ops

gfile = tf.io.gfile

DEFAULT_SIGNATURE = "serving_default"
_SAVED_MODEL = "saved_model.pb"
LATENCY_BUCKETS = tuple(10 * 1.8**i for i in range(33))  # microseconds, as in TensorFlow Serving
_RUNTIME_LATENCY = prometheus_client.Histogram(
    ":tensorflow:serving:runtime_latency", "Wall time (in microseconds) in TensorFlow.", ["model_name", "API", "runtime"],
    buckets=LATENCY_BUCKETS)
_CODES = {code.value[0]: code for code in grpc.StatusCode}

State = get_model_status_pb2.ModelVersionStatus.State


class StatusError(Exception):
  """What a client is told: a canonical code and a message."""

  def __init__(self, code: grpc.StatusCode, message: str):
    super().__init__(f"{code.name}: {message}")
    self.code = code
    self.message = message


def invalid(message: str) -> StatusError:
  return StatusError(grpc.StatusCode.INVALID_ARGUMENT, message)


def status_of(error: Exception) -> StatusError:
  """The status for anything that TensorFlow raises."""
  if isinstance(error, StatusError):
    return error
  if isinstance(error, tf.errors.OpError):
    # What Python adds around the message: where the op was defined, which is not known of a loaded model, and the function.
    message = error.message.rpartition("<stack traces unavailable>\n")[2]
    return StatusError(_CODES.get(error.error_code, grpc.StatusCode.UNKNOWN), re.sub(r" \[Op:\w+\]$", "", message))
  code = grpc.StatusCode.NOT_FOUND if isinstance(error, FileNotFoundError) else grpc.StatusCode.INTERNAL
  return StatusError(code, f"{type(error).__name__}: {error}")


def type_name(dtype: int) -> str:
  """TensorFlow's name of a DataType: float, int32, string."""
  return types_pb2.DataType.Name(dtype).removeprefix("DT_").lower()


# =========================================================================================================== a servable


class Signature:
  """One signature of a loaded SavedModel.

  Attributes:
    name: its key.
    inputs, outputs: name → TensorInfo.
    defaults: input name → TensorProto used where a request has none.
    batchable: False once a run has shown that its outputs cannot be split by rows.
  """

  def __init__(self, name: str, proto: meta_graph_pb2.SignatureDef, function: Callable, *, model_name: str):
    self.name = name
    self.inputs = dict(sorted(proto.inputs.items()))
    self.outputs = dict(sorted(proto.outputs.items()))
    self.defaults = dict(proto.defaults)
    self.batchable = True
    self._function = function
    # "TF1" is TensorFlow Serving's word for this way to run a SavedModel; dashboards filter by it.
    self._latency = _RUNTIME_LATENCY.labels(model_name, "Predict", "TF1")

  def check(self, inputs: Mapping[str, np.ndarray]) -> None:
    """Checks the shapes of all inputs. Raises StatusError: INVALID_ARGUMENT."""
    for name, info in self.inputs.items():
      if info.tensor_shape.unknown_rank:
        continue
      wanted, got = [dim.size for dim in info.tensor_shape.dim], inputs[name].shape
      if len(wanted) != len(got) or any(w not in (-1, g) for w, g in zip(wanted, got)):
        raise invalid(f'input "{name}" has shape {list(got)}, the signature wants {wanted} (-1: any size).')

  def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Runs it.

    Args:
      inputs: name → array, all of the right dtype and shape (see `check`); strings are arrays of bytes objects.

    Returns:
      Output name → array.

    Raises:
      StatusError: the model failed.
    """
    started = time.perf_counter()
    try:
      outputs = self._function(**{name: tf.convert_to_tensor(value, self.inputs[name].dtype) for name, value in inputs.items()})
      # A scalar string's numpy() is bytes, of which np.asarray would cut trailing zeros.
      arrays = {name: np.asarray(value.numpy(), object if value.dtype == tf.string else None) for name, value in outputs.items()}
    except Exception as error:
      raise status_of(error) from error
    self._latency.observe((time.perf_counter() - started) * 1e6)
    return arrays


class Servable:
  """A loaded version of a model.

  Attributes:
    signatures: name → Signature, of those that can be run.
    signature_defs: name → SignatureDef, all of them.
    num_requests: requests that hold it now; guarded by the lock of `Models`.
    retired: no new request gets it.
  """

  def __init__(self, name: str, version: int, path: str, *, tags: Sequence[str] = ("serve",)):
    self.name, self.version, self.path = name, version, path
    self._model = tf.saved_model.load(paths.literal(path), tags=tags)
    saved_model = saved_model_pb2.SavedModel()
    with gfile.GFile(f"{path}/{_SAVED_MODEL}", "rb") as file:
      saved_model.ParseFromString(file.read())
    (graph,) = (
      graph for graph in saved_model.meta_graphs if set(graph.meta_info_def.tags) == set(tags)
    )
    self.signature_defs = dict(graph.signature_def)
    bodies = {}  # a second name of a function runs the first one's: TensorFlow would optimise it anew, which takes a second
    self.signatures = {
      key: Signature(
        key, self.signature_defs[key], bodies.setdefault(_body(function), function), model_name=name
      )
      for key, function in self._model.signatures.items()
    }
    self.num_requests = 0
    self.retired = False


def _body(function) -> tuple:
  """What a signature's function computes, and from which variables."""
  definition = function.function_def
  nodes = tuple(node.SerializeToString(deterministic=True) for node in definition.node_def)
  return (
    nodes,
    str(function.structured_input_signature),
    str(sorted(definition.ret.items())),
    tuple(map(id, function.captured_inputs)),
  )


# ============================================================================================================= versions


@dataclasses.dataclass
class _Broken:
  """A version that did not load: its files then, and at the last look; how often it was tried, and when it is tried again."""

  failed: tuple
  seen: tuple
  num_tries: int
  retry_at: float  # of time.monotonic()


@dataclasses.dataclass(frozen=True)
class Loading:
  """How versions are loaded.

  Attributes:
    tags: of the graph in a SavedModel to load.
    max_retries: how often a version that did not load is tried again while its files stay as they are.
    retry_secs: time before each of these.
  """

  tags: Sequence[str] = ("serve",)
  max_retries: int = 5
  retry_secs: float = 60.0


class Models:
  """The models of a ModelServerConfig and their loaded versions; any thread may ask."""

  def __init__(
    self,
    config: model_server_config_pb2.ModelServerConfig,
    *,
    warm_up: Callable[[Servable], None] | None = None,
    loading: Loading = Loading(),
    labels_for_unavailable: bool = False,
    force_labels: bool = False,
  ):
    """Checks the config and loads nothing yet; see `start`.

    Args:
      config: the models.
      warm_up: runs a version's warm-up requests; what it raises marks the version as broken.
      loading: how versions are loaded.
      labels_for_unavailable: accept a label that is not in use yet for a version that is not available.
      force_labels: accept every label for a version that is not available.

    Raises:
      StatusError: the config is wrong.
    """
    self._warm_up = warm_up
    self._how = loading
    self._labels_for_unavailable, self._force_labels = labels_for_unavailable, force_labels
    self._lock = threading.Lock()  # guards all below, for an instant
    self._configs = _checked(config)
    self._labels: dict[str, dict[str, int]] = {}
    self._available: dict[str, dict[int, Servable]] = {}
    self._states: dict[str, dict[int, tuple[int, StatusError | None]]] = {}
    self._loading = threading.Lock()  # one pass over the base paths at a time
    self._broken: dict[str, _Broken] = {}
    self._complaints: dict[str, str] = {}
    self._garbage = False
    self._watcher: threading.Thread | None = None
    self._stopped = threading.Event()

  # --------------------------------------------------------------------------------------------------------- requests

  @contextlib.contextmanager
  def hold(self, spec: model_pb2.ModelSpec) -> Iterator[Servable]:
    """The loaded version that `spec` names; it is not unloaded meanwhile.

    Raises:
      StatusError: INVALID_ARGUMENT without a name or with an unknown label; NOT_FOUND if there is no such version; UNAVAILABLE
        if the model's first version is still awaited.
    """
    with self._lock:
      self._check_started(spec.name)
      version = self._version(spec)
      available = self._available.get(spec.name, {})
      servable = available.get(max(available, default=None) if version is None else version)
      if servable is None:
        request = f"Latest({spec.name})" if version is None else f"Specific({spec.name}, {version})"
        raise StatusError(grpc.StatusCode.NOT_FOUND, f"Servable not found for request: {request}")
      servable.num_requests += 1
    try:
      yield servable
    finally:
      with self._lock:
        servable.num_requests -= 1
        self._end_if_idle(servable)

  def statuses(self, spec: model_pb2.ModelSpec) -> dict[int, tuple[int, StatusError | None]]:
    """Version → (state, error), newest first, of all versions seen so far or of the one that `spec` names.

    Raises:
      StatusError: NOT_FOUND.
    """
    with self._lock:
      version = self._version(spec) if spec.name else None
      states = dict(sorted(self._states.get(spec.name, {}).items(), reverse=True))
    if version is not None:
      if version not in states:
        raise StatusError(grpc.StatusCode.NOT_FOUND, f"Could not find version {version} of model {spec.name}")
      return {version: states[version]}
    if not states:
      raise StatusError(grpc.StatusCode.NOT_FOUND, f"Could not find any versions of model {spec.name}")
    return states

  def is_configured(self, name: str) -> bool:
    return name in self._configs

  def names(self) -> list[str]:
    """The models of the config."""
    return sorted(self._configs)

  def check_started(self, name: str) -> None:
    """Raises StatusError, UNAVAILABLE, as long as no version of a configured model has been loaded or has failed to."""
    with self._lock:
      self._check_started(name)

  def _check_started(self, name: str) -> None:
    states = self._states.get(name, {})
    if (
      name not in self._configs
      or self._available.get(name)
      or any(state == State.END for state, _ in states.values())
    ):
      return
    loading = (
      f"version {', '.join(map(str, sorted(states)))} of model {name!r} is being loaded."
      if states
      else (f"model {name!r} is not loaded yet.")
    )
    raise StatusError(grpc.StatusCode.UNAVAILABLE, self._complaints.get(name, loading))

  def all_available(self) -> bool:
    """Whether every configured model has a version that answers."""
    with self._lock:
      return all(self._available.get(name) for name in self._configs)

  def _version(self, spec: model_pb2.ModelSpec) -> int | None:
    """The version that `spec` asks for; None: the latest."""
    if not spec.name:
      raise invalid("ModelSpec has no name specified.")
    if spec.WhichOneof("version_choice") == "version_label":
      labels = self._labels.get(spec.name, {})
      if spec.version_label not in labels:
        raise invalid(f"Unrecognized servable version label: {spec.version_label}")
      return labels[spec.version_label]
    return spec.version.value if spec.HasField("version") else None

  # ------------------------------------------------------------------------------------------------------------ config

  def start(self, *, poll_secs: float) -> None:
    """Loads what there is, then watches the base paths from a thread; with `poll_secs` 0 it looks only this once.

    Raises:
      StatusError: a label stands for a version that is not available.
    """
    with self._loading:
      self._look()
      # TensorFlow Serving checks before it loads, so that there labels in a first config always need its flag.
      self._labels = self._checked_labels(self._configs)
    if poll_secs:
      self._watcher = threading.Thread(target=self._watch, args=(poll_secs,), name="versions", daemon=True)
      self._watcher.start()

  def stop(self) -> None:
    """Ends the watching; a thread that Python's end finds inside TensorFlow would crash the process."""
    self._stopped.set()
    if self._watcher:
      self._watcher.join()

  def reload(self, config: model_server_config_pb2.ModelServerConfig) -> None:
    """Changes to another config and waits until its new models are loaded; models that it leaves out are unloaded.

    Raises:
      StatusError: the config is wrong and nothing has changed, or (UNKNOWN) a new model did not become available.
    """
    configs = _checked(config)
    with self._loading:
      labels = self._checked_labels(configs)
      new = configs.keys() - self._configs.keys()
      with self._lock:
        self._configs, self._labels = configs, labels
      self._look()
    if missing := [name for name in sorted(new) if not self._available.get(name)]:
      reasons = []
      for name in missing:
        errors = [f"{{name: {name} version: {version}}} due to error: {error}"
                  for version, (_, error) in self._states.get(name, {}).items() if error]
        reasons += errors or [f"{{name: {name}}} {self._complaints.get(name, '')}"]
      raise StatusError(grpc.StatusCode.UNKNOWN, f"{len(missing)} model(s) did not become available: {{{', '.join(reasons)}}}")

  def _checked_labels(self, configs: Mapping[str, model_server_config_pb2.ModelConfig]) -> dict[str, dict[str, int]]:
    for name, config in configs.items():
      for label, version in config.version_labels.items():
        moved = self._labels.get(name, {}).get(label, version) != version
        allowed = self._force_labels or self._labels_for_unavailable and not moved
        if version not in self._available.get(name, {}) and not allowed:
          raise StatusError(
              grpc.StatusCode.FAILED_PRECONDITION,
              f"Request to assign label to version {version} of model {name}, which is not currently available for inference")
    return {name: dict(config.version_labels) for name, config in configs.items()}

  # ----------------------------------------------------------------------------------------------- loading, unloading

  def _watch(self, poll_secs: float) -> None:
    while not self._stopped.wait(poll_secs):
      with self._loading:
        self._look()
      if self._garbage:
        self._garbage = False
        gc.collect()  # a loaded SavedModel is full of reference cycles

  def _look(self) -> None:
    """One pass: makes what is loaded what the config and the base paths ask for."""
    for name, config in self._configs.items():
      try:
        self._update(config)
      except (OSError, tf.errors.OpError) as error:
        self._complain(name, f"cannot read base path {config.base_path!r} of model {name!r}: {error}")
    for name in self._available.keys() - self._configs.keys():
      self._retire(name, keep=())

  def _update(self, config: model_server_config_pb2.ModelConfig) -> None:
    name = config.name
    if not gfile.isdir(config.base_path):
      self._complain(name, f"base path {config.base_path!r} of model {name!r} is not a folder; waiting for it.")
      return
    available = self._available.setdefault(name, {})
    while True:
      found = self._found(config.base_path, available)
      wanted = _chosen(config.model_version_policy, found)
      if wanted:
        self._complaints.pop(name, None)
      else:
        self._complain(name, f"no version of model {name!r} to serve under {config.base_path!r}; waiting for a folder such as "
                             f"{config.base_path}/1 that holds {_SAVED_MODEL}.")
      new = [version for version in wanted if version not in available or available[version].path != found[version]]
      for version in new:
        self._set_state(name, version, State.START)
      if all([self._load(name, version, found[version]) for version in new]):
        break  # else a broken version leaves its place to an older one
    if not wanted or any(version in available for version in wanted):
      self._retire(name, keep=wanted)

  def _found(self, base_path: str, available: Mapping[int, Servable]) -> dict[int, str]:
    """Version → folder, newest first, without incomplete and broken ones."""
    found = {}
    for child in gfile.listdir(base_path):
      child = child.rstrip("/")
      if re.fullmatch(r"\d{1,18}", child):
        path = f"{base_path.rstrip('/')}/{child}"
        loaded = int(child) in available and available[int(child)].path == path
        if loaded or gfile.exists(f"{path}/{_SAVED_MODEL}") and not self._is_broken(path):
          found[int(child)] = path
    return dict(sorted(found.items(), reverse=True))

  def _is_broken(self, path: str) -> bool:
    """Whether it did not load and is the same still, or is changing just now."""
    broken = self._broken.get(path)
    if broken is None:
      return False
    files, before = _files(path), broken.seen
    broken.seen = files
    return files != before or files == broken.failed and time.monotonic() < broken.retry_at

  def _load(self, name: str, version: int, path: str) -> bool:
    self._set_state(name, version, State.LOADING)
    started, files = time.perf_counter(), ()
    try:
      files = _files(path)
      servable = Servable(name, version, path, tags=self._how.tags)
      if self._warm_up:
        self._warm_up(servable)
      if _files(path) != files:
        raise StatusError(grpc.StatusCode.ABORTED, f"{path} changed while it was being loaded; write it aside, then rename it.")
    except Exception as error:  # whatever a SavedModel can do must not end the server
      status = status_of(error)
      logging.error(
        "model %s version %d did not load: %s; %s",
        name,
        version,
        status,
        self._note_broken(path, files),
      )
      if version in self._available[name]:  # the same number from an earlier base path, which stays
        self._set_state(name, version, State.AVAILABLE)
      else:
        self._set_state(name, version, State.END, status)
      return False
    self._broken.pop(path, None)
    with self._lock:
      replaced = self._available[name].get(version)
      self._available[name][version] = servable
      self._states[name][version] = (State.AVAILABLE, None)
      if replaced:
        replaced.retired = True
    logging.info("model %s version %d is available after %.1f s", name, version, time.perf_counter() - started)
    return True

  def _note_broken(self, path: str, files: tuple) -> str:
    """Remembers a version that did not load; says when it is tried again."""
    before = self._broken.get(path)
    num_tries = before.num_tries + 1 if before and before.failed == files else 1
    again = num_tries <= self._how.max_retries
    self._broken[path] = _Broken(
      files, files, num_tries, time.monotonic() + self._how.retry_secs if again else math.inf
    )
    if again:
      return f"it is tried again in {self._how.retry_secs:g} s, retry {num_tries} of {self._how.max_retries}, or if its files change."
    return "it is tried again if its files change."

  def _retire(self, name: str, *, keep: Sequence[int]) -> None:
    """Gives no more requests to versions that are not to be kept; each is unloaded when the last it has is answered."""
    with self._lock:
      gone = [self._available[name].pop(version) for version in list(self._available[name]) if version not in keep]
      for servable in gone:
        servable.retired = True
        self._states[name][servable.version] = (State.UNLOADING, None)
        self._end_if_idle(servable)
    if gone:
      logging.info("model %s: unloading version(s) %s", name, [servable.version for servable in gone])

  def _end_if_idle(self, servable: Servable) -> None:
    if servable.retired and not servable.num_requests and servable.version not in self._available.get(servable.name, {}):
      self._states[servable.name][servable.version] = (State.END, None)
      self._garbage = True

  def _set_state(self, name: str, version: int, state: int, error: StatusError | None = None) -> None:
    with self._lock:
      self._states.setdefault(name, {})[version] = (state, error)

  def _complain(self, name: str, message: str) -> None:
    """Logs a complaint about a model when it is new."""
    if self._complaints.get(name) != message:
      self._complaints[name] = message
      logging.warning("%s", message)


def _checked(config: model_server_config_pb2.ModelServerConfig) -> dict[str, model_server_config_pb2.ModelConfig]:
  """Model name → its part of the config. Raises StatusError: INVALID_ARGUMENT."""
  if config.WhichOneof("config") != "model_config_list":
    raise invalid("the config has no model_config_list; only that is supported.")
  configs = {}
  for model in config.model_config_list.config:
    if model.name in configs:
      raise invalid(f"Illegal to list model {model.name} multiple times in config list")
    if not model.name or not model.base_path:
      raise invalid(f"a model needs a name and a base_path, got name {model.name!r}, base_path {model.base_path!r}.")
    if not model.model_platform:
      raise invalid("Illegal setting neither ModelServerConfig::model_type (deprecated) nor ModelServerConfig::model_platform.")
    if model.model_platform != "tensorflow":
      raise invalid(f"Model {model.name} requests unsupported platform {model.model_platform}")
    configs[model.name] = model
  return configs


def _chosen(policy, found: Mapping[int, str]) -> list[int]:
  """The versions that a ServableVersionPolicy chooses of those found (newest first)."""
  choice = policy.WhichOneof("policy_choice")
  if choice == "all":
    return list(found)
  if choice == "specific":
    return [version for version in found if version in policy.specific.versions]
  return list(found)[:max(policy.latest.num_versions, 1)]


def _files(path: str) -> tuple:
  """What tells one content of a folder from another: all files with their sizes and times."""
  files = []
  for folder, _, names in gfile.walk(path):
    for name in names:
      stat = gfile.stat(f"{folder}/{name}")
      files.append((f"{folder}/{name}", stat.length, stat.mtime_nsec))
  return tuple(sorted(files))

"""Manages the models and versions that are served.

Watches base paths; loads, warms up, labels, swaps and unloads versions.

As in TensorFlow Serving, M/<integer>/ is a version. A new version is loaded and warmed up next to
the old one and takes over immediately; the old one is unloaded once its last request has been
answered. A broken version never replaces a good one; it is retried a number of times, and whenever
its files change. States, codes and messages are those of TensorFlow Serving, with one difference:
this server already listens while it loads its first versions, and until they are loaded it answers
UNAVAILABLE with the reason.
"""

import contextlib
import gc
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import grpc
from absl import logging
from tensorflow_serving.apis import get_model_status_pb2, model_pb2
from tensorflow_serving.config import model_server_config_pb2

from realm_tf.storage import paths
from serving.tf_serving import version_folders
from serving.tf_serving.model_configs import Loading, checked, chosen
from serving.tf_serving.servables import SAVED_MODEL, Servable
from serving.tf_serving.status import StatusError, invalid, status_of

State = get_model_status_pb2.ModelVersionStatus.State
_LOADING = Loading()


class Models:
  """The models of a ModelServerConfig and their loaded versions; thread-safe."""

  def __init__(
    self,
    config: model_server_config_pb2.ModelServerConfig,
    *,
    warm_up: Callable[[Servable], None] | None = None,
    loading: Loading = _LOADING,
    labels_for_unavailable: bool = False,
    force_labels: bool = False,
  ):
    """Checks the config, without loading anything; see `start`.

    Args:
      config: the models.
      warm_up: runs the warm-up requests of a version; if it raises, the version is broken.
      loading: how versions are loaded.
      labels_for_unavailable: accept a label that is not in use yet for a version that is not
        available.
      force_labels: accept every label for a version that is not available.

    Raises:
      StatusError: the config is invalid.
    """
    self._warm_up = warm_up
    self._how = loading
    self._labels_for_unavailable, self._force_labels = labels_for_unavailable, force_labels
    self._lock = threading.Lock()  # guards all below; held only briefly
    self._configs = checked(config)
    self._labels: dict[str, dict[str, int]] = {}
    self._available: dict[str, dict[int, Servable]] = {}
    self._states: dict[str, dict[int, tuple[int, StatusError | None]]] = {}
    self._loading = threading.Lock()  # one pass over the base paths at a time
    self._broken: dict[str, version_folders.Broken] = {}
    self._complaints: dict[str, str] = {}
    self._garbage = False
    self._watcher: threading.Thread | None = None
    self._stopped = threading.Event()

  # --------------------------------------------------------------------------------------- requests

  @contextlib.contextmanager
  def hold(self, spec: model_pb2.ModelSpec) -> Iterator[Servable]:
    """Yields the loaded version that `spec` names, and keeps it from being unloaded.

    Raises:
      StatusError: INVALID_ARGUMENT if there is no name or the label is unknown; NOT_FOUND if there
        is no such version; UNAVAILABLE if the first version of the model is not loaded yet.
    """
    with self._lock:
      self._check_started(spec.name)
      version = self._version(spec)
      available = self._available.get(spec.name, {})
      servable = available.get(max(available, default=-1) if version is None else version)
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
    """Returns version → (state, error), newest first.

    Includes all versions seen so far, or only the one that `spec` names.

    Raises:
      StatusError: NOT_FOUND.
    """
    with self._lock:
      version = self._version(spec) if spec.name else None
      states = dict(sorted(self._states.get(spec.name, {}).items(), reverse=True))
    if version is not None:
      if version not in states:
        raise StatusError(
          grpc.StatusCode.NOT_FOUND, f"Could not find version {version} of model {spec.name}"
        )
      return {version: states[version]}
    if not states:
      raise StatusError(
        grpc.StatusCode.NOT_FOUND, f"Could not find any versions of model {spec.name}"
      )
    return states

  def is_configured(self, name: str) -> bool:
    return name in self._configs

  def names(self) -> list[str]:
    """Returns the names of the models in the config."""
    return sorted(self._configs)

  def check_started(self, name: str) -> None:
    """Raises StatusError, UNAVAILABLE, if a configured model has not started.

    A model has started once one of its versions has been loaded or has failed to load.
    """
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
    """Returns whether every configured model has a version that answers, and paths are watched."""
    with self._lock:
      available = all(self._available.get(name) for name in self._configs)
    return available and (self._watcher is None or self._watcher.is_alive())

  def _version(self, spec: model_pb2.ModelSpec) -> int | None:
    """Returns the version that `spec` names, or None for the latest."""
    if not spec.name:
      raise invalid("ModelSpec has no name specified.")
    if spec.WhichOneof("version_choice") == "version_label":
      labels = self._labels.get(spec.name, {})
      if spec.version_label not in labels:
        raise invalid(f"Unrecognized servable version label: {spec.version_label}")
      return labels[spec.version_label]
    return spec.version.value if spec.HasField("version") else None

  # ----------------------------------------------------------------------------------------- config

  def start(self, *, poll_secs: float) -> None:
    """Loads the versions found, then watches the base paths in a thread.

    If `poll_secs` is 0, the base paths are read only once.

    Raises:
      StatusError: a label refers to a version that is not available.
    """
    with self._loading:
      self._look()
      # TensorFlow Serving checks labels before loading, so that labels in its first config always
      # need its flag.
      self._labels = self._checked_labels(self._configs)
    if poll_secs:
      self._watcher = threading.Thread(
        target=self._watch, args=(poll_secs,), name="versions", daemon=True
      )
      self._watcher.start()

  def stop(self, *, timeout_secs: float | None = None) -> bool:
    """Stops watching; returns whether the thread has ended, since loading cannot be interrupted.

    If Python exits while a thread is inside TensorFlow, the process crashes.
    """
    self._stopped.set()
    if self._watcher:
      self._watcher.join(timeout_secs)
    return not (self._watcher and self._watcher.is_alive())

  def reload(self, config: model_server_config_pb2.ModelServerConfig) -> None:
    """Switches to another config and waits until its new models are loaded.

    Models that are not in the config are unloaded.

    Raises:
      StatusError: the config is invalid and nothing has changed, or (UNKNOWN) a new model did not
        become available.
    """
    configs = checked(config)
    with self._loading:
      labels = self._checked_labels(configs)
      new = configs.keys() - self._configs.keys()
      with self._lock:
        self._configs, self._labels = configs, labels
      self._look()
    if missing := [name for name in sorted(new) if not self._available.get(name)]:
      reasons = []
      for name in missing:
        errors = [
          f"{{name: {name} version: {version}}} due to error: {error}"
          for version, (_, error) in self._states.get(name, {}).items()
          if error
        ]
        reasons += errors or [f"{{name: {name}}} {self._complaints.get(name, '')}"]
      raise StatusError(
        grpc.StatusCode.UNKNOWN,
        f"{len(missing)} model(s) did not become available: {{{', '.join(reasons)}}}",
      )

  def _checked_labels(
    self, configs: Mapping[str, model_server_config_pb2.ModelConfig]
  ) -> dict[str, dict[str, int]]:
    for name, config in configs.items():
      for label, version in config.version_labels.items():
        moved = self._labels.get(name, {}).get(label, version) != version
        allowed = self._force_labels or self._labels_for_unavailable and not moved
        if version not in self._available.get(name, {}) and not allowed:
          raise StatusError(
            grpc.StatusCode.FAILED_PRECONDITION,
            f"Request to assign label to version {version} of model {name}, which is not "
            "currently available for inference",
          )
    return {name: dict(config.version_labels) for name, config in configs.items()}

  # ----------------------------------------------------------------------------- loading, unloading

  def _watch(self, poll_secs: float) -> None:
    while not self._stopped.wait(poll_secs):
      try:
        with self._loading:
          self._look()
        if self._garbage:
          self._garbage = False
          gc.collect()  # a loaded SavedModel is full of reference cycles
      except Exception:  # without this thread, new versions would never be served
        logging.exception("checking the base paths failed; trying again in %g s", poll_secs)

  def _look(self) -> None:
    """Loads and unloads versions once, to match the config and the base paths."""
    for name, config in self._configs.items():
      try:
        self._update(config)
      except Exception as error:  # a problem with one model must not affect the others
        self._complain(
          name, f"cannot read base path {config.base_path!r} of model {name!r}: {error}"
        )
    for name in self._available.keys() - self._configs.keys():
      self._retire(name, keep=())

  def _update(self, config: model_server_config_pb2.ModelConfig) -> None:
    name = config.name
    if not paths.is_folder(config.base_path):
      self._complain(
        name, f"base path {config.base_path!r} of model {name!r} is not a folder; waiting for it."
      )
      return
    available = self._available.setdefault(name, {})
    while True:
      found = self._found(config.base_path, available)
      wanted = chosen(config.model_version_policy, found)
      if wanted:
        self._complaints.pop(name, None)
      else:
        self._complain(
          name,
          f"no version of model {name!r} to serve under {config.base_path!r}; waiting for a "
          f"folder such as {config.base_path}/1 that holds {SAVED_MODEL}.",
        )
      new = [
        version
        for version in wanted
        if version not in available or available[version].path != found[version]
      ]
      for version in new:
        self._set_state(name, version, State.START)
      if all([self._load(name, version, found[version]) for version in new]):
        break  # otherwise a broken version is replaced by an older one
    if not wanted or any(version in available for version in wanted):
      self._retire(name, keep=wanted)

  def _found(self, base_path: str, available: Mapping[int, Servable]) -> dict[int, str]:
    """Returns version → folder, newest first, without incomplete and broken versions."""
    return {
      version: path
      for version, path in version_folders.found(base_path).items()
      if version in available
      and available[version].path == path
      or paths.exists(f"{path}/{SAVED_MODEL}")
      and not self._is_broken(path)
    }

  def _is_broken(self, path: str) -> bool:
    """Returns whether a version failed to load and is unchanged, or is still being changed."""
    broken = self._broken.get(path)
    if broken is None:
      return False
    files, before = version_folders.files(path), broken.seen
    broken.seen = files
    return files != before or files == broken.failed and time.monotonic() < broken.retry_at

  def _load(self, name: str, version: int, path: str) -> bool:
    self._set_state(name, version, State.LOADING)
    started, files = time.perf_counter(), ()
    try:
      files = version_folders.files(path)
      servable = Servable(name, version, path, tags=self._how.tags)
      if self._warm_up:
        self._warm_up(servable)
      if version_folders.files(path) != files:
        raise StatusError(
          grpc.StatusCode.ABORTED,
          f"{path} changed while being loaded; write it to another folder, then rename it.",
        )
    except Exception as error:  # no error of a SavedModel may end the server
      status = status_of(error)
      logging.error(
        "model %s version %d failed to load: %s; %s",
        name,
        version,
        status,
        self._note_broken(path, files),
      )
      if version in self._available[name]:  # the same number from an earlier base path is kept
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
    logging.info(
      "model %s version %d is available after %.1f s", name, version, time.perf_counter() - started
    )
    return True

  def _note_broken(self, path: str, files: tuple) -> str:
    """Records a version that failed to load; returns a message that says when it is retried."""
    before = self._broken.get(path)
    num_tries = before.num_tries + 1 if before and before.failed == files else 1
    again = num_tries <= self._how.max_retries
    self._broken[path] = version_folders.Broken(
      files, files, num_tries, time.monotonic() + self._how.retry_secs if again else math.inf
    )
    if again:
      return (
        f"it will be retried in {self._how.retry_secs:g} s (retry {num_tries} of "
        f"{self._how.max_retries}), or if its files change."
      )
    return "it will be retried if its files change."

  def _retire(self, name: str, *, keep: Sequence[int]) -> None:
    """Stops giving requests to versions not in `keep`.

    Each is unloaded once its last request has been answered.
    """
    with self._lock:
      gone = [
        self._available[name].pop(version)
        for version in list(self._available[name])
        if version not in keep
      ]
      for servable in gone:
        servable.retired = True
        self._states[name][servable.version] = (State.UNLOADING, None)
        self._end_if_idle(servable)
    if gone:
      logging.info(
        "model %s: unloading version(s) %s", name, [servable.version for servable in gone]
      )

  def _end_if_idle(self, servable: Servable) -> None:
    if (
      servable.retired
      and not servable.num_requests
      and servable.version not in self._available.get(servable.name, {})
    ):
      self._states[servable.name][servable.version] = (State.END, None)
      self._garbage = True

  def _set_state(
    self, name: str, version: int, state: int, error: StatusError | None = None
  ) -> None:
    with self._lock:
      self._states.setdefault(name, {})[version] = (state, error)

  def _complain(self, name: str, message: str) -> None:
    """Logs a complaint about a model if it is new."""
    if self._complaints.get(name) != message:
      self._complaints[name] = message
      logging.warning("%s", message)

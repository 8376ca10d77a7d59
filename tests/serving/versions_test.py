"""Versions of models: which are loaded, and which take over.

Also tests what happens to broken versions, and when old ones are unloaded.
"""

import logging as python_logging
import os
import shutil
import time

import grpc
import pytest
import tensorflow as tf
from google.protobuf import text_format
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow_serving.apis import get_model_status_pb2, model_pb2
from tensorflow_serving.config import model_server_config_pb2

from realm_tf.storage import publishing
from serving.tf_serving.servables import Servable
from serving.tf_serving.status import StatusError
from serving.tf_serving.versions import Loading, Models

State = get_model_status_pb2.ModelVersionStatus.State
AVAILABLE, END, UNLOADING = State.AVAILABLE, State.END, State.UNLOADING


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> str:
  module = tf.Module()
  module.v = tf.Variable(1.0)
  module.add = tf.function(
    lambda x: {"y": x + module.v}, input_signature=[tf.TensorSpec([None], tf.float32, "x")]
  )
  path = str(tmp_path_factory.mktemp("saved") / "model")
  tf.saved_model.save(module, path, signatures=module.add)
  return path


@pytest.fixture
def base(tmp_path, saved):
  """A base path, and a function that publishes versions there."""
  path = tmp_path / "base"
  path.mkdir()

  def publish(*versions):
    for version in versions:
      shutil.copytree(saved, f"{path}/{version}.partial")
      os.rename(f"{path}/{version}.partial", path / str(version))

  publish.path = path
  return publish


def config_of(*models: str) -> model_server_config_pb2.ModelServerConfig:
  text = "".join(f'config {{ model_platform: "tensorflow" {model} }}' for model in models)
  return text_format.Parse(
    f"model_config_list {{ {text} }}", model_server_config_pb2.ModelServerConfig()
  )


_STARTED: list[Models] = []


@pytest.fixture(autouse=True)
def stop_models():
  yield
  while _STARTED:
    _STARTED.pop().stop()


def started(base, policy: str = "", labels: str = "", **kwargs) -> Models:
  models = Models(config_of(f'name: "m" base_path: "{base.path}" {policy} {labels}'), **kwargs)
  _STARTED.append(models)
  models.start(poll_secs=0.02)
  return models


def states(models: Models, name: str = "m") -> dict[int, int]:
  return {
    version: state
    for version, (state, _) in models.statuses(model_pb2.ModelSpec(name=name)).items()
  }


def wait_for(models: Models, wanted: dict[int, int]) -> None:
  end = time.monotonic() + 30
  while (got := states(models)) != wanted and time.monotonic() < end:
    time.sleep(0.01)
  assert got == wanted


def latest(models: Models) -> int:
  with models.hold(model_pb2.ModelSpec(name="m")) as servable:
    return servable.version


@pytest.mark.parametrize(
  "policy, wanted",
  [
    ("", [11]),
    ("model_version_policy { latest { num_versions: 2 } }", [9, 11]),
    ("model_version_policy { all {} }", [1, 9, 11]),
    ("model_version_policy { specific { versions: 1 versions: 9 versions: 77 } }", [1, 9]),
  ],
)
def test_policies(base, policy, wanted):
  base(1, 9, 11)  # numbers, not text: 11 is newer than 9
  models = started(base, policy)
  assert states(models) == dict.fromkeys(wanted, AVAILABLE)
  assert latest(models) == max(wanted)


def test_only_complete_folders_named_by_a_number_count(base):
  base(3)
  (base.path / "4").mkdir()
  (base.path / "4/variables").mkdir()
  (base.path / "7").write_text("a file")
  base("5x", "-6", "v8")
  models = started(base, "model_version_policy { all {} }")
  assert states(models) == {3: AVAILABLE}


def test_a_new_version_takes_over_and_the_old_one_ends(base):
  base(1)
  models = started(base)
  base(2)
  wait_for(models, {1: END, 2: AVAILABLE})
  assert latest(models) == 2
  with pytest.raises(
    StatusError, match=r"NOT_FOUND: Servable not found for request: Specific\(m, 1\)"
  ):
    with models.hold(model_pb2.ModelSpec(name="m", version={"value": 1})):
      pass


def test_a_version_in_use_is_unloaded_when_its_last_request_is_done(base):
  base(1)
  models = started(base)
  with models.hold(model_pb2.ModelSpec(name="m")) as one:
    with models.hold(model_pb2.ModelSpec(name="m")):
      base(2)
      wait_for(models, {1: UNLOADING, 2: AVAILABLE})
      assert latest(models) == 2
    time.sleep(0.1)
    assert states(models) == {1: UNLOADING, 2: AVAILABLE}
    outputs = one.signatures["serving_default"].run({"x": [1.0]})
    assert outputs["y"].tolist() == [2.0]
  assert states(models) == {1: END, 2: AVAILABLE}


def test_a_deleted_version_gives_way_to_an_older_one(base):
  base(1, 2)
  models = started(base)
  (base.path / "2/saved_model.pb").unlink()  # being deleted: still served
  time.sleep(0.1)
  assert states(models) == {2: AVAILABLE}
  shutil.rmtree(base.path / "2")
  wait_for(models, {1: AVAILABLE, 2: END})


def test_a_base_path_that_is_gone_for_a_while_changes_nothing(base):
  base(1)
  models = started(base)
  base.path.rename(f"{base.path}.away")
  time.sleep(0.1)
  assert states(models) == {1: AVAILABLE}


def test_a_base_path_may_come_later(base, caplog):
  base.path.rmdir()
  with caplog.at_level(python_logging.WARNING):
    models = started(base)
    assert not models.all_available()
    with pytest.raises(
      StatusError, match="UNAVAILABLE: base path '.*' of model 'm' is not a folder; waiting for it."
    ):
      latest(models)
    time.sleep(0.1)
  lines = [record.message for record in caplog.records if str(base.path) in record.message]
  assert len(lines) == 1, lines  # logged once
  base.path.mkdir()
  base(1)
  wait_until = time.monotonic() + 30
  while not models.all_available() and time.monotonic() < wait_until:
    time.sleep(0.01)
  assert latest(models) == 1


def test_a_broken_version_never_replaces_a_good_one_and_is_tried_again_when_changed(base, saved):
  attempts = []
  base(1)
  models = started(base, warm_up=lambda servable: attempts.append(servable.version))
  shutil.copytree(saved, f"{base.path}/.aside")
  shutil.rmtree(f"{base.path}/.aside/variables")
  os.rename(f"{base.path}/.aside", base.path / "2")
  wait_for(models, {1: AVAILABLE, 2: END})
  _, error = models.statuses(model_pb2.ModelSpec(name="m"))[2]
  assert error.code == grpc.StatusCode.NOT_FOUND and "variables" in error.message, error
  assert latest(models) == 1
  broken = dict(models._broken)
  time.sleep(0.2)
  assert (states(models), dict(models._broken)) == ({1: AVAILABLE, 2: END}, broken)
  shutil.copytree(f"{saved}/variables", base.path / "2/variables")
  wait_for(models, {1: END, 2: AVAILABLE})
  assert attempts == [1, 2]


def test_a_version_of_ours_that_was_damaged_is_not_served(base, saved, tmp_path):
  """Changes one bit of a weight, which TensorFlow would load."""
  base(1)
  models = started(base)
  wait_for(models, {1: AVAILABLE})
  aside = tmp_path / "2"
  with publishing.publish(str(aside), kind="servable", config={}, inputs={}) as staged:
    shutil.copytree(saved, staged.path, dirs_exist_ok=True)
  data = aside / "variables" / "variables.data-00000-of-00001"
  flipped = bytearray(data.read_bytes())
  flipped[2] ^= 1
  data.write_bytes(flipped)
  os.rename(aside, base.path / "2")
  wait_for(models, {1: AVAILABLE, 2: END})
  _, error = models.statuses(model_pb2.ModelSpec(name="m"))[2]
  assert "variables.data-00000-of-00001' has SHA-256" in error.message, error
  assert latest(models) == 1


def test_at_the_start_a_broken_version_leaves_its_place_to_an_older_one(base):
  base(1, 2)
  (base.path / "3").mkdir()
  (base.path / "3/saved_model.pb").write_bytes(b"nothing of the kind")
  models = started(base)
  assert states(models) == {2: AVAILABLE, 3: END}
  _, error = models.statuses(model_pb2.ModelSpec(name="m"))[3]
  assert error.code == grpc.StatusCode.INTERNAL, error


def test_a_version_that_is_still_being_copied_is_loaded_when_it_has_come_to_rest(base, saved):
  """Copies piece by piece as `cp` does, saved_model.pb first."""
  base(1)
  models = started(base)
  shutil.copytree(f"{saved}", base.path / "2", ignore=lambda *_: ["variables"])
  (base.path / "2/variables").mkdir()
  for name in sorted(os.listdir(f"{saved}/variables"), reverse=True):
    data = open(f"{saved}/variables/{name}", "rb").read()
    with open(base.path / "2/variables" / name, "wb", buffering=0) as file:
      for i in range(0, len(data), 100):
        file.write(data[i : i + 100])
        time.sleep(0.02)
        assert latest(models) == 1 or i + 100 >= len(data)
  wait_for(models, {1: END, 2: AVAILABLE})


def test_a_version_that_changes_while_it_is_loaded_is_loaded_again(base):
  base(1)
  changes = []

  def change(servable):
    if servable.version == 2 and not changes:
      changes.append(os.utime(f"{servable.path}/saved_model.pb", (1, 1)))

  models = started(base, warm_up=change)
  base(2)
  wait_for(models, {1: END, 2: AVAILABLE})
  assert changes


def test_a_failing_warm_up_marks_a_version_as_broken(base):
  def warm_up(servable):
    if servable.version == 2:
      raise StatusError(grpc.StatusCode.INVALID_ARGUMENT, "no such input")

  base(1)
  models = started(base, warm_up=warm_up)
  base(2)
  wait_for(models, {1: AVAILABLE, 2: END})
  assert models.statuses(model_pb2.ModelSpec(name="m"))[2][1].message == "no such input"


def test_a_broken_version_is_tried_again_some_times(base):
  attempts = []

  def warm_up(servable):
    attempts.append(servable.version)
    if servable.version == 2 or len(attempts) < 3:
      raise StatusError(grpc.StatusCode.INTERNAL, "not now")

  base(1)
  models = started(base, warm_up=warm_up, loading=Loading(max_retries=2, retry_secs=0.05))
  wait_for(models, {1: AVAILABLE})
  assert attempts == [1, 1, 1], "a load that fails for a while succeeds at the second retry"
  base(2)
  end = time.monotonic() + 30
  while attempts.count(2) < 3 and time.monotonic() < end:
    time.sleep(0.01)
  time.sleep(0.2)
  assert attempts.count(2) == 3, "one attempt and two retries"
  assert states(models) == {1: AVAILABLE, 2: END}


def test_a_model_that_is_being_loaded_is_unavailable_and_says_so(base):
  seen = []

  def warm_up(servable):
    for ask in (lambda: latest(models), lambda: models.check_started("m")):
      with pytest.raises(StatusError) as error:
        ask()
      seen.append(str(error.value))

  base(7)
  models = Models(config_of(f'name: "m" base_path: "{base.path}"'), warm_up=warm_up)
  models.start(poll_secs=0)
  assert seen == ["UNAVAILABLE: version 7 of model 'm' is being loaded."] * 2
  assert latest(models) == 7


def test_the_graph_with_the_tags_is_loaded(base, saved):
  shutil.copytree(saved, base.path / "1")
  proto = saved_model_pb2.SavedModel.FromString((base.path / "1/saved_model.pb").read_bytes())
  proto.meta_graphs[0].meta_info_def.tags[:] = ["serve", "tpu"]
  (base.path / "1/saved_model.pb").write_bytes(proto.SerializeToString())
  assert latest(started(base, loading=Loading(tags=("tpu", "serve")))) == 1
  assert states(started(base)) == {1: END}


def test_two_names_of_a_function_share_it(tmp_path):
  """Otherwise TensorFlow would optimise it for each name."""
  module = tf.Module()
  module.v = tf.Variable(2.0)
  spec = [tf.TensorSpec([None], tf.float32, "x")]
  module.times = tf.function(lambda x: {"y": x * module.v}, input_signature=spec)
  module.plus = tf.function(lambda x: {"y": x + module.v}, input_signature=spec)
  tf.saved_model.save(
    module,
    str(tmp_path / "1"),
    signatures={"serving_default": module.times, "a": module.times, "b": module.plus},
  )
  signatures = Servable("m", 1, str(tmp_path / "1")).signatures
  assert (
    signatures["a"]._function
    is signatures["serving_default"]._function
    is not signatures["b"]._function
  )
  assert {
    name: signature.run({"x": [3.0]})["y"].tolist() for name, signature in signatures.items()
  } == {"serving_default": [6.0], "a": [6.0], "b": [5.0]}


def test_labels(base):
  base(1, 2)
  both = "model_version_policy { all {} }"
  models = started(base, both, 'version_labels { key: "stable" value: 1 }')
  with models.hold(model_pb2.ModelSpec(name="m", version_label="stable")) as servable:
    assert servable.version == 1
  with pytest.raises(
    StatusError, match="INVALID_ARGUMENT: Unrecognized servable version label: nope"
  ):
    with models.hold(model_pb2.ModelSpec(name="m", version_label="nope")):
      pass
  with pytest.raises(
    StatusError,
    match="FAILED_PRECONDITION: Request to assign label to version 3 of model m, which is not",
  ):
    started(base, both, 'version_labels { key: "next" value: 3 }')
  models = started(
    base, both, 'version_labels { key: "next" value: 3 }', labels_for_unavailable=True
  )
  with pytest.raises(
    StatusError, match=r"NOT_FOUND: Servable not found for request: Specific\(m, 3\)"
  ):
    with models.hold(model_pb2.ModelSpec(name="m", version_label="next")):
      pass
  moved = config_of(
    f'name: "m" base_path: "{base.path}" {both} version_labels {{ key: "next" value: 4 }}'
  )
  with pytest.raises(StatusError, match="version 4 of model m, which is not"):
    models.reload(moved)
  forced = started(base, both, 'version_labels { key: "next" value: 3 }', force_labels=True)
  forced.reload(moved)
  base(3)
  wait_for(models, {1: AVAILABLE, 2: AVAILABLE, 3: AVAILABLE})
  with models.hold(model_pb2.ModelSpec(name="m", version_label="next")) as servable:
    assert servable.version == 3


def test_reload_with_another_base_path_serves_what_is_there(base, tmp_path, saved):
  base(1)
  models = started(base)
  shutil.copytree(saved, tmp_path / "other/1")
  models.reload(config_of(f'name: "m" base_path: "{tmp_path}/other"'))
  with models.hold(model_pb2.ModelSpec(name="m")) as servable:
    assert servable.path == f"{tmp_path}/other/1"
  assert states(models) == {1: AVAILABLE}


@pytest.mark.parametrize(
  "models, message",
  [
    (
      ['name: "m" base_path: "/b"', 'name: "m" base_path: "/b"'],
      "Illegal to list model m multiple times in config list",
    ),
    (['name: "m"'], "needs a name and a base_path"),
    (['base_path: "/b"'], "needs a name and a base_path"),
  ],
)
def test_wrong_configs_are_refused(models, message):
  with pytest.raises(StatusError, match=message) as error:
    Models(config_of(*models))
  assert error.value.code == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
  "platform, message",
  [("", "Illegal setting neither"), ("caffe", "requests unsupported platform caffe")],
)
def test_wrong_platforms_are_refused(platform, message):
  config = config_of('name: "m" base_path: "/b"')
  config.model_config_list.config[0].model_platform = platform
  with pytest.raises(StatusError, match=message):
    Models(config)


def test_unloaded_models_are_freed(base):
  """Memory is freed: TensorFlow's resources go with the Python object."""
  import weakref

  base(1)
  models = started(base)
  with models.hold(model_pb2.ModelSpec(name="m")) as servable:
    gone = weakref.ref(servable._model)
  del servable
  base(2)
  wait_for(models, {1: END, 2: AVAILABLE})
  end = time.monotonic() + 10
  while gone() is not None and time.monotonic() < end:
    time.sleep(0.05)
  assert gone() is None

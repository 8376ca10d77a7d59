"""The files of deploy/ agree with the programs they start and with each other."""

import json
import re
import shlex
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request

import tensorflow as tf
import yaml
from apache_beam.options import pipeline_options
from packaging import specifiers
from tensorflow_serving.config import model_server_config_pb2

from serving import signatures
from serving.tf_serving import server_config
from tests.processes import free_ports
from tests.source_code import REPOSITORY, flags_of

DEPLOY = REPOSITORY / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "docker-compose.yaml").read_text())["services"]
KUBERNETES = {
  (one["kind"], one["metadata"]["name"]): one
  for one in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
}
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()


def commands() -> dict[str, list[str]]:
  """Returns place → whole command line; those of TensorFlow Serving itself are lists of flags."""
  (from_image,) = re.findall(r"^CMD (\[.*?\])$", DOCKERFILE.replace("\\\n", ""), re.MULTILINE)
  found = {"Dockerfile": json.loads(from_image)} | {
    f"compose {name}": service["command"] for name, service in COMPOSE.items()
  }
  for (kind, name), deployment in KUBERNETES.items():
    if kind == "Deployment":
      (container,) = deployment["spec"]["template"]["spec"]["containers"]
      found[f"kubernetes {name}"] = container["command"] + container["args"]
  return found


def given(command: list[str]) -> dict[str, str]:
  return dict(word.removeprefix("--").split("=", 1) for word in command if word.startswith("--"))


def port_of(command: list[str], name: str) -> int:
  return int(
    given(command).get(
      name, {"port": signatures.GRPC_PORT, "rest_api_port": signatures.REST_PORT}[name]
    )
  )


def test_commands_take_flags_that_exist():
  for where, command in commands().items():
    program = "serving/web/__main__.py" if "serving.web" in command else "serving/model_server.py"
    assert given(command).keys() <= flags_of(program), f"{where}: {shlex.join(command)}"
    if "serving.web" not in command:
      assert (port_of(command, "port"), port_of(command, "rest_api_port")) == (
        signatures.GRPC_PORT,
        signatures.REST_PORT,
      )


def test_compose_ports_and_paths():
  models = read_models_config()
  for name, service in COMPOSE.items():
    if name == "web":
      assert [f"{given(service['command'])['port']}:8080"] == service["ports"]
      continue
    assert service["ports"] == ["8500:8500", "8501:8501"]
    mounts = {volume.rsplit(":", 2)[1] for volume in service["volumes"]}
    assert mounts == {models.model_config_list.config[0].base_path, "/config"}
    for flag in ("model_config_file", "batching_parameters_file"):
      path = given(service["command"])[flag]
      assert path.startswith("/config/") and (DEPLOY / path.removeprefix("/config/")).exists()
    assert "model" in service["networks"]["default"]["aliases"]  # the server that the page asks
    assert service.get("build", {}).get("target", "server") in re.findall(r" AS (\w+)", DOCKERFILE)
  assert given(COMPOSE["web"]["command"])["rest"] == f"http://model:{signatures.REST_PORT}"


def test_kubernetes_objects_belong_together():
  for name in ("realm", "realm-web"):
    deployment, service = KUBERNETES["Deployment", name], KUBERNETES["Service", name]
    template = deployment["spec"]["template"]
    labels = template["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert service["spec"]["selector"].items() <= labels.items()
    (container,) = template["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert {port["targetPort"] for port in service["spec"]["ports"]} == set(ports)
    assert {
      probe["httpGet"]["port"] for key, probe in container.items() if key.endswith("Probe")
    } <= set(ports)
    volumes = {volume["name"] for volume in template["spec"].get("volumes", ())}
    assert {mount["name"] for mount in container.get("volumeMounts", ())} == volumes
    flags = given(container["args"])
    assert set(ports.values()) == {
      int(flags[flag]) for flag in ("port", "rest_api_port") if flag in flags
    }, name
  (mount,) = (mount for mount in serving_container()["volumeMounts"] if mount["name"] == "models")
  assert mount["mountPath"] == read_models_config().model_config_list.config[0].base_path
  assert given(commands()["kubernetes realm-web"])["rest"] == f"http://realm:{signatures.REST_PORT}"
  claim = KUBERNETES["Deployment", "realm"]["spec"]["template"]["spec"]["volumes"][0][
    "persistentVolumeClaim"
  ]["claimName"]
  assert ("PersistentVolumeClaim", claim) in KUBERNETES


def test_dataflow_job():
  """Its own flags come before `--`, Beam's after; workers run in the image that starts them."""
  pod = yaml.safe_load((DEPLOY / "dataflow_job.yaml").read_text())["spec"]["template"]["spec"]
  (container,) = pod["containers"]
  *_, job = container["command"]
  at = container["args"].index("--")
  own, beam = container["args"][:at], container["args"][at + 1 :]
  assert given(own).keys() <= flags_of(f"{job.replace('.', '/')}.py")
  options = pipeline_options.PipelineOptions(beam).get_all_options(drop_default=True)
  assert options == {**given(beam), "max_num_workers": 50}
  assert options["sdk_container_image"] == container["image"]


def serving_container() -> dict:
  return KUBERNETES["Deployment", "realm"]["spec"]["template"]["spec"]["containers"][0]


def read_models_config() -> model_server_config_pb2.ModelServerConfig:
  return server_config.read_config(
    str(DEPLOY / "models.config"), model_server_config_pb2.ModelServerConfig()
  )


def test_text_protos():
  (model,) = read_models_config().model_config_list.config
  assert (model.name, model.base_path, model.model_platform) == (
    signatures.MODEL_NAME,
    "/models/realm",
    "tensorflow",
  )
  parameters = server_config.batching_parameters(str(DEPLOY / "batching.config"))
  assert (parameters.max_batch_size, parameters.timeout_secs, parameters.num_threads) == (
    32,
    0.002,
    4,
  )


def test_model_server_starts_as_compose_says_and_answers_the_probes(tmp_path):
  """The image's command runs with paths and ports of this machine.

  A small model replaces the volume.
  """

  class Echo(tf.Module):
    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="question")])
    def answer(self, question):
      return {"answer": tf.strings.upper(question)}

  model = Echo()
  tf.saved_model.save(
    model, str(tmp_path / "models/1"), signatures={"serving_default": model.answer}
  )
  config = tmp_path / "models.config"
  config.write_text(
    (DEPLOY / "models.config").read_text().replace('"/models/realm"', f'"{tmp_path / "models"}"')
  )
  port, rest_port = free_ports(2)
  here = {
    "host": "127.0.0.1",
    "port": str(port),
    "rest_api_port": str(rest_port),
    "model_config_file": str(config),
    "batching_parameters_file": str(DEPLOY / "batching.config"),
  }
  command = COMPOSE["model-server"]["command"]
  assert here.keys() < given(command).keys() and command[:3] == [
    "python",
    "-m",
    "serving.model_server",
  ]
  command = [
    *command[1:3],
    *(f"--{name}={here.get(name, value)}" for name, value in given(command).items()),
  ]
  server = subprocess.Popen([sys.executable, *command], cwd=REPOSITORY)
  try:
    probes = {
      key: probe["httpGet"]["path"]
      for key, probe in serving_container().items()
      if key.endswith("Probe")
    }
    deadline = time.monotonic() + 120
    while status(rest_port, probes["startupProbe"]) != 200:
      assert server.poll() is None and time.monotonic() < deadline
      time.sleep(0.2)
    for key, path in probes.items():
      assert status(rest_port, path) == 200, key
    request = urllib.request.Request(
      f"http://127.0.0.1:{rest_port}/v1/models/realm:predict", data=b'{"inputs": ["who"]}'
    )
    with urllib.request.urlopen(request, timeout=30) as response:
      assert json.load(response) == {"outputs": ["WHO"]}
  finally:
    server.terminate()
    assert server.wait(timeout=60) == 0


def status(port: int, path: str) -> int:
  try:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as response:
      return response.status
  except urllib.error.HTTPError as error:
    return error.code
  except OSError:
    return 0


# -------------------------------------------------------------------------------------------- image


def test_images_have_the_pinned_versions():
  pins = dict(
    re.findall(r"^([\w.-]+)==(\S+)$", (REPOSITORY / "requirements.txt").read_text(), re.MULTILINE)
  )
  python = re.search(r"FROM python:(\d+\.\d+)-slim", DOCKERFILE)[1]
  beam_python, beam = re.search(r"apache/beam_python(\d+\.\d+)_sdk:(\S+)", DOCKERFILE).groups()
  project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
  assert specifiers.SpecifierSet(project["requires-python"]).contains(python)
  assert f"Programming Language :: Python :: {python}" in project["classifiers"]
  assert (beam_python, beam) == (python, pins["apache-beam"])
  assert (
    f"apache-beam[gcp]=={pins['apache-beam']}\n"
    in (REPOSITORY / "requirements_dataflow.txt").read_text()
  )
  images = {COMPOSE["tensorflow-serving"]["image"], serving_container()["image"]}
  # TensorFlow Text's ops must be those that the servable was exported with
  assert images == {f"tensorflow/serving:{pins['tensorflow']}"}

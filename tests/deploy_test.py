"""Deploy files agree with the programs that they start and with each other, and the package holds every file."""

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile

import pytest
import tensorflow as tf
import yaml
from apache_beam.options import pipeline_options
from tensorflow_serving.config import model_server_config_pb2

from serving import model_server, server_flags, signatures
from tests import imports_test
from tests.processes import free_ports

REPOSITORY = imports_test.REPOSITORY
DEPLOY = REPOSITORY / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "docker-compose.yaml").read_text())["services"]
KUBERNETES = {(one["kind"], one["metadata"]["name"]): one for one in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()


def flags_of(program: str) -> set[str]:
  """Names of the flags that a program defines."""
  if program == "serving/model_server.py":
    values = server_flags.flags.FlagValues()
    server_flags.define(values)
    return set(values)
  tree = ast.parse((REPOSITORY / program).read_text())
  return {node.args[0].value for node in ast.walk(tree)
          if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.startswith("DEFINE_")}


def commands() -> dict[str, list[str]]:
  """Where it stands → a whole command line; TensorFlow Serving's own are lists of flags."""
  (from_image,) = re.findall(r"^CMD (\[.*?\])$", DOCKERFILE.replace("\\\n", ""), re.MULTILINE)
  found = {"Dockerfile": json.loads(from_image)} | {f"compose {name}": service["command"] for name, service in COMPOSE.items()}
  for (kind, name), deployment in KUBERNETES.items():
    if kind == "Deployment":
      (container,) = deployment["spec"]["template"]["spec"]["containers"]
      found[f"kubernetes {name}"] = container["command"] + container["args"]
  return found


def given(command: list[str]) -> dict[str, str]:
  return dict(word.removeprefix("--").split("=", 1) for word in command if word.startswith("--"))


def port_of(command: list[str], name: str) -> int:
  return int(given(command).get(name, {"port": signatures.GRPC_PORT, "rest_api_port": signatures.REST_PORT}[name]))


def test_commands_take_flags_that_exist():
  for where, command in commands().items():
    program = "serving/web/__main__.py" if "serving.web" in command else "serving/model_server.py"
    print(f"{where}: {shlex.join(command)}")
    assert given(command).keys() <= flags_of(program)
    if "serving.web" not in command:
      assert (port_of(command, "port"), port_of(command, "rest_api_port")) == (signatures.GRPC_PORT, signatures.REST_PORT)


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
    assert "model" in service["networks"]["default"]["aliases"]  # whom the page asks
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
    assert {probe["httpGet"]["port"] for key, probe in container.items() if key.endswith("Probe")} <= set(ports)
    volumes = {volume["name"] for volume in template["spec"].get("volumes", ())}
    assert {mount["name"] for mount in container.get("volumeMounts", ())} == volumes
    flags = given(container["args"])
    assert set(ports.values()) == {int(flags[flag]) for flag in ("port", "rest_api_port") if flag in flags}
    print(f"{name}: {ports}")
  (mount,) = (mount for mount in serving_container()["volumeMounts"] if mount["name"] == "models")
  assert mount["mountPath"] == read_models_config().model_config_list.config[0].base_path
  assert given(commands()["kubernetes realm-web"])["rest"] == f"http://realm:{signatures.REST_PORT}"
  claim = KUBERNETES["Deployment", "realm"]["spec"]["template"]["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"]
  assert ("PersistentVolumeClaim", claim) in KUBERNETES


def test_dataflow_job():
  """Its own flags before the `--`, Beam's after it; workers run in the image that starts them."""
  pod = yaml.safe_load((DEPLOY / "dataflow_job.yaml").read_text())["spec"]["template"]["spec"]
  (container,) = pod["containers"]
  *_, job = container["command"]
  at = container["args"].index("--")
  own, beam = container["args"][:at], container["args"][at + 1:]
  assert given(own).keys() <= flags_of(f"{job.replace('.', '/')}.py")
  options = pipeline_options.PipelineOptions(beam).get_all_options(drop_default=True)
  print(job, options)
  assert options == {**given(beam), "max_num_workers": 50}
  assert options["sdk_container_image"] == container["image"]


def serving_container() -> dict:
  return KUBERNETES["Deployment", "realm"]["spec"]["template"]["spec"]["containers"][0]


def read_models_config() -> model_server_config_pb2.ModelServerConfig:
  return model_server.read_config(str(DEPLOY / "models.config"), model_server_config_pb2.ModelServerConfig())


def test_text_protos():
  (model,) = read_models_config().model_config_list.config
  assert (model.name, model.base_path, model.model_platform) == (signatures.MODEL_NAME, "/models/realm", "tensorflow")
  parameters = model_server.batching_parameters(str(DEPLOY / "batching.config"))
  print(model, parameters)
  assert (parameters.max_batch_size, parameters.timeout_secs, parameters.num_threads) == (32, 0.002, 4)


def test_model_server_starts_as_compose_says_and_answers_the_probes(tmp_path):
  """The command of the image with paths and ports of this machine, a small model in the volume's place."""
  class Echo(tf.Module):

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="question")])
    def answer(self, question):
      return {"answer": tf.strings.upper(question)}

  model = Echo()
  tf.saved_model.save(model, str(tmp_path / "models/1"), signatures={"serving_default": model.answer})
  config = tmp_path / "models.config"
  config.write_text((DEPLOY / "models.config").read_text().replace('"/models/realm"', f'"{tmp_path / "models"}"'))
  port, rest_port = free_ports(2)
  here = {"host": "127.0.0.1", "port": str(port), "rest_api_port": str(rest_port), "model_config_file": str(config),
          "batching_parameters_file": str(DEPLOY / "batching.config")}
  command = COMPOSE["model-server"]["command"]
  assert here.keys() < given(command).keys() and command[:3] == ["python", "-m", "serving.model_server"]
  command = [*command[1:3], *(f"--{name}={here.get(name, value)}" for name, value in given(command).items())]
  server = subprocess.Popen([sys.executable, *command], cwd=REPOSITORY)
  try:
    probes = {key: probe["httpGet"]["path"] for key, probe in serving_container().items() if key.endswith("Probe")}
    deadline = time.monotonic() + 120
    while status(rest_port, probes["startupProbe"]) != 200:
      assert server.poll() is None and time.monotonic() < deadline
      time.sleep(0.2)
    for key, path in probes.items():
      print(f"{key}: GET {path} {status(rest_port, path)}")
      assert status(rest_port, path) == 200
    request = urllib.request.Request(f"http://127.0.0.1:{rest_port}/v1/models/realm:predict", data=b'{"inputs": ["who"]}')
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


# ------------------------------------------------------------------------------------------------------- image, package


def test_images_have_the_pinned_versions():
  pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (REPOSITORY / "requirements.txt").read_text(), re.MULTILINE))
  python = re.search(r"FROM python:(\d+\.\d+)-slim", DOCKERFILE)[1]
  beam_python, beam = re.search(r"apache/beam_python(\d+\.\d+)_sdk:(\S+)", DOCKERFILE).groups()
  assert f'requires-python = "=={python}.*"' in (REPOSITORY / "pyproject.toml").read_text()
  assert (beam_python, beam) == (python, pins["apache-beam"])
  assert f"apache-beam[gcp]=={pins['apache-beam']}\n" in (REPOSITORY / "requirements_dataflow.txt").read_text()
  images = {COMPOSE["tensorflow-serving"]["image"], serving_container()["image"]}
  assert images == {f"tensorflow/serving:{pins['tensorflow']}"}  # TensorFlow Text's ops must be those that exported the servable


def test_the_package_holds_every_file(tmp_path):
  """`pip install .`, as workers and images have it."""
  pytest.importorskip("setuptools")
  packages = ("realm_tf", "beam_jobs", "serving", "configs", "quickstart_corpus")
  source = tmp_path / "source"
  for package in packages:
    shutil.copytree(REPOSITORY / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
  for file in ("pyproject.toml", "requirements.txt"):
    shutil.copy(REPOSITORY / file, source)
  done = subprocess.run(
      [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", f"--wheel-dir={tmp_path}", str(source)],
      capture_output=True, text=True, timeout=200)
  assert done.returncode == 0, done.stderr
  (wheel,) = tmp_path.glob("*.whl")
  with zipfile.ZipFile(wheel) as archive:
    got = {name for name in archive.namelist() if ".dist-info/" not in name}
    (metadata,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
  wanted = {str(path.relative_to(REPOSITORY)) for package in packages for path in (REPOSITORY / package).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts and path.name != "BUILD"}
  print(f"{wheel.name}: {len(got)} files")
  assert got == wanted
  assert "Requires-Dist: tensorflow==2.20.0" in metadata

"""Every job is submitted to Dataflow as it would be in the cloud.

A stand-in for the service runs the submitted pipeline.

The commands, Beam's DataflowRunner, its REST client and what it stages are the real ones; the
stand-in answers the REST calls on localhost and runs the staged pipeline with Beam's local runner,
so that the jobs' outputs can be compared.
"""

import http.server
import json
import os
import subprocess
import sys
import threading

import pytest
from apache_beam.options import pipeline_options
from apache_beam.portability import python_urns
from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.runners.portability.fn_api_runner import fn_runner

from realm_tf.corpus import passages
from realm_tf.storage import artifacts
from tests import beam_commands
from tests.processes import REPOSITORY
from tests.source_code import flags_of

pytest.importorskip(
  "apitools", reason="no Dataflow client: pip install -r requirements_dataflow.txt"
)

IMAGE = "europe-docker.pkg.dev/project/realm/worker:1"


class Service(http.server.ThreadingHTTPServer):
  """A server that answers like dataflow.googleapis.com.

  Attributes:
    jobs: the requests, in order.
    pipelines: the pipeline that each of them staged.
  """

  def __init__(self, staging: str):
    super().__init__(("localhost", 0), Calls)
    self.staging, self.jobs, self.pipelines = staging, [], []

  def run(self, job: dict) -> None:
    """Runs a staged pipeline in this process instead of in the job's containers."""
    with open(os.path.join(self.staging, "pipeline.pb"), "rb") as file:
      pipeline = beam_runner_api_pb2.Pipeline.FromString(file.read())
    self.jobs.append(job)
    self.pipelines.append(beam_runner_api_pb2.Pipeline.FromString(pipeline.SerializeToString()))
    for environment in pipeline.components.environments.values():
      here = beam_runner_api_pb2.Environment(
        urn=python_urns.EMBEDDED_PYTHON, capabilities=environment.capabilities
      )
      environment.CopyFrom(here)
    fn_runner.FnApiRunner().run_via_runner_api(pipeline, pipeline_options.PipelineOptions([]))


class Calls(http.server.BaseHTTPRequestHandler):
  """Handles POST .../jobs, which creates a job and returns when it has succeeded, and GET of it."""

  def do_POST(self):
    job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
    self.server.run(job | {"path": self.path.partition("?")[0]})
    self._reply({"name": job["name"]})

  def do_GET(self):
    self._reply({})

  def _reply(self, more: dict) -> None:
    job = {
      "id": "job-1",
      "projectId": "project",
      "location": "europe-west1",
      "currentState": "JOB_STATE_DONE",
    }
    body = json.dumps(job | more).encode()
    self.send_response(200)
    self.send_header("Content-Type", "application/json")
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    self.wfile.write(body)

  def log_message(self, *args):
    pass


@pytest.fixture
def service(tmp_path):
  staging = tmp_path / "staging"
  staging.mkdir()
  with Service(str(staging)) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_every_job(service, toy, tmp_path):
  for job, *arguments in beam_commands.commands(toy, str(tmp_path)):
    beam = [
      "--runner=DataflowRunner",
      "--project=project",
      "--region=europe-west1",
      f"--job_name={job.replace('_', '-')}",
      f"--sdk_container_image={IMAGE}",
      "--sdk_location=container",  # as in docs/; the rest replaces Google by localhost
      f"--temp_location={tmp_path / 'tmp'}",
      f"--staging_location={service.staging}",
      "--no_auth",
      f"--dataflow_endpoint=http://localhost:{service.server_port}",
    ]
    done = subprocess.run(
      [sys.executable, "-m", f"beam_jobs.{job}", *arguments, "--", *beam],
      cwd=REPOSITORY,
      capture_output=True,
      text=True,
      timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    sent, pipeline = service.jobs[-1], service.pipelines[-1]
    assert sent["path"] == "/v1b3/projects/project/locations/europe-west1/jobs" and sent[
      "name"
    ] == job.replace("_", "-")
    (pool,) = sent["environment"]["workerPools"]
    assert [image["containerImage"] for image in pool["sdkHarnessContainerImages"]] == [IMAGE]
    # Workers find everything in the image: no pickled main session is needed, and no package is
    # installed when they start.
    assert not {package["name"] for package in pool["packages"]} & {
      "pickled_main_session",
      "workflow.tar.gz",
      "requirements.txt",
    }
    steps = [
      one.unique_name
      for one in pipeline.components.transforms.values()
      if one.spec.urn == "beam:transform:pardo:v1"
    ]
    assert len(steps) >= 2, f"{job}: {steps}"
  assert len(service.jobs) == 3
  beam_commands.check_outputs(toy, str(tmp_path))


def test_a_template_publishes_by_itself(service, toy, tmp_path):
  """The program that a flex template's launcher starts writes the job to a file and exits.

  The job, run later, leaves a complete folder.
  """
  template, output = tmp_path / "template.json", tmp_path / "passages"
  done = subprocess.run(
    [
      sys.executable,
      "deploy/launch_template.py",
      "--job=make_passages",
      f"--input={toy.config().corpus.knowledge}",
      f"--output={output}",
      "--runner=DataflowRunner",
      f"--vocab={toy.config().passages}",
      "--max_tokens=64",
      "--project=project",
      "--region=europe-west1",
      "--job_name=x",
      f"--sdk_container_image={IMAGE}",
      "--sdk_location=container",
      f"--temp_location={tmp_path / 'tmp'}",
      f"--staging_location={service.staging}",
      "--no_auth",
      f"--template_location={template}",
      f"--dataflow_endpoint=http://localhost:{service.server_port}",
    ],
    cwd=REPOSITORY,
    capture_output=True,
    text=True,
    timeout=200,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  assert "its last step publishes" in done.stdout and not output.exists() and not service.jobs
  service.run(json.loads(template.read_text()))
  info, wanted = artifacts.read_info(str(output)), artifacts.read_info(toy.config().passages)
  assert (
    info["counts"] == wanted["counts"] and info["vocab_fingerprint"] == wanted["vocab_fingerprint"]
  )
  for path in passages.shard_paths(toy.config().passages, "passages"):
    assert (output / os.path.basename(path)).read_bytes() == open(path, "rb").read()


def test_template_metadata_names_flags_that_exist():
  with open(os.path.join(REPOSITORY, "deploy/template_metadata.json"), encoding="utf-8") as file:
    parameters = json.load(file)["parameters"]
  flags = flags_of("beam_jobs/make_passages.py") | flags_of("beam_jobs/annotate_spans.py")
  names = {parameter["name"] for parameter in parameters}
  assert names - {"job"} <= flags and {"job", "input", "output", "passages"} <= names
  assert {parameter["name"] for parameter in parameters if not parameter.get("isOptional")} == {
    "job",
    "output",
  }
  assert all(parameter["label"] and parameter["helpText"] for parameter in parameters)


def test_a_job_that_dataflow_refuses(service, toy, tmp_path, monkeypatch):
  """Prints one line and leaves no passages folder."""

  def refuse(self):
    body = b'{"error": {"code": 400, "message": "no such region", "status": "INVALID_ARGUMENT"}}'
    self.send_response(400)
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    self.wfile.write(body)

  monkeypatch.setattr(Calls, "do_POST", refuse)
  output = tmp_path / "passages"
  done = subprocess.run(
    [
      sys.executable,
      "-m",
      "beam_jobs.make_passages",
      f"--input={toy.config().corpus.knowledge}",
      f"--output={output}",
      f"--vocab={toy.config().passages}",
      "--",
      "--runner=DataflowRunner",
      "--project=project",
      "--region=europe-west1",
      "--job_name=x",
      f"--sdk_container_image={IMAGE}",
      "--sdk_location=container",
      f"--temp_location={tmp_path / 'tmp'}",
      f"--staging_location={service.staging}",
      "--no_auth",
      f"--dataflow_endpoint=http://localhost:{service.server_port}",
    ],
    cwd=REPOSITORY,
    capture_output=True,
    text=True,
    timeout=200,
  )
  last = done.stderr.splitlines()[-1]
  assert done.returncode == 1 and last.startswith("make_passages:") and "no such region" in last, (
    last
  )
  assert not output.exists() and not list(tmp_path.glob(".staging-passages"))

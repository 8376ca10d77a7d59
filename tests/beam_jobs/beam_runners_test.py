"""Every job gives the same result on every runner.

The runners: in this process, with two worker processes, and through a portable job service.
"""

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys

import apache_beam as beam
import pytest

from beam_jobs import pipelines
from tests.beam_commands import check_outputs, commands
from tests.processes import REPOSITORY, free_ports, is_listening, wait_until


@pytest.fixture(scope="module", params=["two worker processes", "portable job service"])
def runner(request):
  """Returns Beam's options for a runner."""
  if request.param == "two worker processes":
    yield ["--direct_num_workers=2", "--direct_running_mode=multi_processing"]
    return
  job_port, pool_port = free_ports(2)
  with (
    background("apache_beam.runners.portability.local_job_service_main", f"--port={job_port}"),
    background("apache_beam.runners.worker.worker_pool_main", f"--service_port={pool_port}"),
  ):
    for port in (job_port, pool_port):
      wait_until(lambda port=port: is_listening(port), f"port {port}")
    yield [
      "--runner=PortableRunner",
      f"--job_endpoint=localhost:{job_port}",
      "--environment_type=EXTERNAL",
      f"--environment_config=localhost:{pool_port}",
    ]


def test_every_job(runner, toy, tmp_path):
  for job, *arguments in commands(toy, str(tmp_path)):
    done = subprocess.run(
      [sys.executable, "-m", f"beam_jobs.{job}", *arguments, "--", *runner],
      cwd=REPOSITORY,
      capture_output=True,
      text=True,
      timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
  check_outputs(toy, str(tmp_path))


def switches_of_worker(_: None) -> str:
  """Returns the switches of the process that runs this; see realm_tf.cli."""
  hidden = [name for name in ("sklearn", "matplotlib", "jax") if name not in sys.modules]
  found = {
    "process": os.getpid(),
    "threshold": gc.get_threshold()[0],
    "level": os.environ.get("TF_CPP_MIN_LOG_LEVEL"),
    "not imported": hidden,
    "options": sys.modules["tensorflow"].config.optimizer.get_experimental_options(),
  }
  return json.dumps(found)


def listening(pids) -> str:
  """The addresses that processes listen on, as /proc/net writes them: in hexadecimal."""
  sockets = set()
  for pid in (*pids, os.getpid()):
    for name in os.listdir(f"/proc/{pid}/fd"):
      with contextlib.suppress(OSError):
        sockets.add(os.readlink(f"/proc/{pid}/fd/{name}"))
  found = set()
  for table in ("tcp", "tcp6"):
    with open(f"/proc/net/{table}") as file:
      for line in list(file)[1:]:
        fields = line.split()
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
          found.add(fields[1])
  return json.dumps(sorted(found))


def test_two_worker_processes_and_their_runner_listen_on_the_loopback_interface_alone(tmp_path):
  options = ["--direct_num_workers=2", "--direct_running_mode=multi_processing"]
  with pipelines.pipeline(options) as root:
    (
      root
      | beam.Create([[os.getpid()]])
      | beam.Map(listening)
      | beam.io.WriteToText(str(tmp_path / "found"))
    )
  (path,) = tmp_path.iterdir()
  addresses = [address.partition(":")[0] for address in json.loads(path.read_text())]
  loopback = {"0100007F", "0" * 24 + "01000000", "0" * 16 + "FFFF00000100007F"}
  assert len(addresses) >= 4 and set(addresses) <= loopback, addresses


def test_worker_processes_have_the_switches_of_commands(runner, tmp_path):
  with pipelines.pipeline(runner) as root:
    (
      root
      | beam.Create([None])
      | beam.Map(switches_of_worker)
      | beam.io.WriteToText(str(tmp_path / "found"))
    )
  (path,) = tmp_path.iterdir()
  found = json.loads(path.read_text())
  assert found.pop("process") != os.getpid()
  assert found.pop("options")["loop_optimization"] is False
  assert found == {
    "threshold": 50_000,
    "level": "3",
    "not imported": ["sklearn", "matplotlib", "jax"],
  }


# ---------------------------------------------------------------------------------------- processes


@contextlib.contextmanager
def background(module: str, *args: str):
  """A Beam service with this Python first on its PATH."""
  path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
  service = subprocess.Popen(
    [sys.executable, "-m", module, *args],
    cwd=REPOSITORY,
    start_new_session=True,
    env={**os.environ, "PATH": path, "PYTHONPATH": REPOSITORY},
  )
  try:
    yield
  finally:
    os.killpg(service.pid, signal.SIGKILL)
    service.wait()

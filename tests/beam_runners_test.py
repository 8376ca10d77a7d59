"""Every job gives the same on every runner: in this process, with two worker processes, through a portable job service."""

import contextlib
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from realm_tf import artifacts, index, paths
from tests.processes import REPOSITORY, free_ports, is_listening, wait_until


@pytest.fixture(scope="module", params=["two worker processes", "portable job service"])
def runner(request):
  """Beam's options for a runner."""
  if request.param == "two worker processes":
    yield ["--direct_num_workers=2", "--direct_running_mode=multi_processing"]
    return
  job_port, pool_port = free_ports(2)
  with background("apache_beam.runners.portability.local_job_service_main", f"--port={job_port}"), \
       background("apache_beam.runners.worker.worker_pool_main", f"--service_port={pool_port}"):
    for port in (job_port, pool_port):
      wait_until(lambda: is_listening(port), f"port {port}")
    yield ["--runner=PortableRunner", f"--job_endpoint=localhost:{job_port}", "--environment_type=EXTERNAL",
           f"--environment_config=localhost:{pool_port}"]


def test_every_job(runner, toy, tmp_path):
  for job, *arguments in commands(toy, str(tmp_path)):
    done = subprocess.run([sys.executable, "-m", f"beam_jobs.{job}", *arguments, "--", *runner], cwd=REPOSITORY, capture_output=True,
                          text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
  check_outputs(toy, str(tmp_path))


def commands(toy, folder: str) -> list[list[str]]:
  """Every job with its flags, to make again below `folder` what `toy` has; refresh_index embeds as embed_passages does."""
  config, made = toy.config(), os.path.join(folder, "passages")
  return [
      ["make_passages", f"--input={config.corpus.knowledge}", f"--output={made}", f"--vocab={config.passages}",
       f"--max_tokens={config.corpus.max_tokens}"],
      ["annotate_spans", f"--passages={made}", f"--output={os.path.join(folder, 'spans')}"],
      ["refresh_index", f"--snapshots={toy.path('ict/snapshots')}", f"--passages={made}",
       f"--indexes={os.path.join(folder, 'indexes')}", "--nojit_compile"],
  ]


def check_outputs(toy, folder: str) -> None:
  """What the commands made is what one process made."""
  config, made = toy.config(), os.path.join(folder, "passages")
  for got, wanted, what in ((made, config.passages, "passages"), (os.path.join(folder, "spans"), config.knowledge_spans, "spans")):
    assert files_of(got) == files_of(wanted)
    print(f"{what}: {len(files_of(got))} record files of the same bytes as in one process")
  num_rows = artifacts.read_info(made)["counts"]["passages"]
  got, wanted = (index.read_embeddings(found, num_rows=num_rows)
                 for found in (artifacts.latest(os.path.join(folder, "indexes")), toy.path("ict/indexes/00000000")))
  print(f"embeddings differ by at most {np.abs(got - wanted).max():.1e}")
  np.testing.assert_allclose(got, wanted, atol=1e-5)


def files_of(folder: str) -> dict[str, bytes]:
  found = {}
  for path in paths.listed(folder, r".+\.tfrecord\.gz"):
    with open(path, "rb") as file:
      found[os.path.basename(path)] = file.read()
  return found


# ------------------------------------------------------------------------------------------------------------ processes


@contextlib.contextmanager
def background(module: str, *args: str):
  """A Beam service with this Python first on its PATH."""
  path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
  service = subprocess.Popen([sys.executable, "-m", module, *args], cwd=REPOSITORY, start_new_session=True,
                             env={**os.environ, "PATH": path, "PYTHONPATH": REPOSITORY})
  try:
    yield
  finally:
    os.killpg(service.pid, signal.SIGKILL)
    service.wait()

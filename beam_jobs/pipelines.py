"""Beam's runner and options, shared by all jobs.

The command line of a job is `python -m beam_jobs.JOB --its=flags -- --beam_options`: absl parses
what precedes the `--`, and passes `main` the list [program, everything after `--`].
"""

import contextlib
import types
from collections.abc import Iterator, Sequence

import apache_beam as beam
import grpc
from apache_beam.options import pipeline_options
from apache_beam.runners.portability import local_job_service
from apache_beam.runners.portability.fn_api_runner import worker_handlers

from realm_tf.storage import ownership, publishing


def pipeline(beam_args: Sequence[str]) -> beam.Pipeline:
  """Returns a pipeline that runs when its `with` block ends, and is waited for there.

  Args:
    beam_args: Beam's options. Without any, everything runs in this process. With
      `--direct_num_workers=2 --direct_running_mode=multi_processing`, it runs in two others; with
      `--runner=PortableRunner --job_endpoint=...`, on a cluster.
  """
  options = pipeline_options.PipelineOptions(list(beam_args))
  standard = options.view_as(pipeline_options.StandardOptions)
  if standard.runner in (None, "DirectRunner"):
    # Beam's DirectRunner tries Prism first, a Go program that it downloads. Its fallback is
    # FnApiRunner, which has the same options and is pure Python.
    standard.runner = "FnApiRunner"
    _listen_on_loopback()
  return beam.Pipeline(options=options)


def _listen_on_loopback() -> None:
  """Makes Beam's local runner listen on the loopback interface only.

  Its servers, which pass functions to worker processes, do not authenticate clients and listen on
  all interfaces, and Beam has no option for the address.
  """
  for module in (local_job_service, worker_handlers):
    vars(module)["grpc"] = _LoopbackGrpc("grpc")


class _LoopbackGrpc(types.ModuleType):
  """gRPC, except that servers told to listen on all interfaces listen on loopback only."""

  def __getattr__(self, name: str):
    return getattr(grpc, name)

  @staticmethod
  def server(*args, **options) -> grpc.Server:
    made = grpc.server(*args, **options)
    add = made.add_insecure_port
    made.add_insecure_port = lambda address: add(address.replace("[::]", "localhost"))
    return made


def is_left_running(beam_args: Sequence[str]) -> bool:
  """Returns whether the pipeline continues to run after its `with` block ends.

  That is the effect of --no_wait_until_finish, for jobs whose last step publishes.
  """
  return (
    pipeline_options.PipelineOptions(list(beam_args))
    .view_as(pipeline_options.StandardOptions)
    .no_wait_until_finish
  )


@contextlib.contextmanager
def published(publication: publishing.Publication) -> Iterator[None]:
  """Runs a pipeline whose last step publishes; if it fails, the staged files are deleted."""
  try:
    yield
  except Exception:  # not if interrupted: the pipeline may be running elsewhere
    publishing.discard(publication)
    raise
  finally:
    ownership.release(publication.path)

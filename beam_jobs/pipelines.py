"""How every job starts: one place for Beam's runner, the command line, and what people see when a job fails.

A job's command line is `python -m beam_jobs.JOB --its=flags -- --beam_options`: absl reads what stands before the `--`, and
hands `main` the list [program, everything after `--`].
"""

import contextlib
import importlib
import logging
import sys
from collections.abc import Iterator, Sequence

import apache_beam as beam
from absl import app, flags
from apache_beam.options import pipeline_options

from realm_tf import artifacts, errors


def pipeline(beam_args: Sequence[str]) -> beam.Pipeline:
  """A pipeline that runs, and is waited for, when its `with` block ends.

  Args:
    beam_args: Beam's options. None: everything runs in this process. `--direct_num_workers=2
      --direct_running_mode=multi_processing`: in two others. `--runner=PortableRunner --job_endpoint=...`: on a cluster.
  """
  options = pipeline_options.PipelineOptions(list(beam_args))
  standard = options.view_as(pipeline_options.StandardOptions)
  if standard.runner in (None, "DirectRunner"):
    # Beam's DirectRunner tries Prism first, a Go program that it downloads. FnApiRunner is what it falls back to: the same
    # options, Python alone.
    standard.runner = "FnApiRunner"
  return beam.Pipeline(options=options)


def is_left_running(beam_args: Sequence[str]) -> bool:
  """Whether the pipeline goes on after its `with` block: --no_wait_until_finish, for jobs whose last step publishes."""
  return pipeline_options.PipelineOptions(list(beam_args)).view_as(pipeline_options.StandardOptions).no_wait_until_finish


@contextlib.contextmanager
def removed_on_failure(folder: str) -> Iterator[None]:
  """Deletes a staging folder when its job fails."""
  try:
    yield
  except Exception:  # not when it is interrupted: it may go on elsewhere
    if artifacts.gfile.exists(folder):
      artifacts.gfile.rmtree(folder)
    raise


def start(job: str) -> None:
  """Runs `main` of the module named `job` as the program; a failure is one line on stderr and exit code 1.

  The module is imported by its name, although it is already loaded as `__main__`, because workers find a DoFn by the name of
  its module.
  """
  flags.DEFINE_bool("traceback", False, "When the job fails, show the whole traceback instead of one line.")

  def main(argv: Sequence[str]) -> None:
    logging.getLogger("apache_beam").setLevel(logging.WARNING)  # it tells every step of every worker
    try:
      importlib.import_module(job).main(argv)
    except Exception as error:  # whatever it is, people get a sentence
      if flags.FLAGS.traceback:
        raise
      sys.exit(f"{job.split('.')[-1]}: {errors.words_of(error)} (--traceback shows where)")

  app.run(main)

"""Starting commands: process settings, flags and config, and errors in one line.

A command's flags are defined at the top of its module, above the imports that take seconds:

    from absl import flags

    from realm_tf import cli

    if __name__ == "__main__":
      flags.DEFINE_string("workdir", None, "A trainer's workdir.", required=True)
      cli.start("realm_tf.evaluate")

    import tensorflow as tf

So --help answers at once, and what TensorFlow reads on import is set before. The module is then
imported by its name and its `main` runs; nothing below the block runs in `__main__`.
"""

import contextlib
import gc
import glob
import importlib
import json
import logging
import os
import signal
import sys
import threading
import zipfile
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import app, flags

from realm_tf import errors, imports

Main = Callable[[Sequence[str]], object]

_INTERRUPTED = 130  # 128 and the number of SIGINT
_REPEAT_SECS = 2.0  # between interrupts on Ctrl-C, until one ends the command

_KNOWN_COMPLAINTS = (
  "apitools not found",  # Beam, on every start, because BigQuery's client is not installed
  "No semi_persistent_directory found",  # Beam's workers, which are processes, not containers
  # TensorFlow, which warns because every index has its own functions to compile
  "triggered tf.function retracing",
)


# ==================================================================================== how to start


def start(command: str, *, tensorflow: bool = True, optimize_loops: bool = False) -> None:
  """Runs `main(argv)` of a module as the program, and ends the process.

  A user's mistake ends it with one clear line and exit code 1 instead of a traceback.

  Args:
    command: the module's full name.
    tensorflow: see `set_switches`.
    optimize_loops: see `set_switches`.
  """

  def main(argv: Sequence[str]) -> None:
    set_switches(tensorflow=tensorflow, optimize_loops=optimize_loops)
    importlib.import_module(command).main(argv)

  _run(_with_mistakes_in_one_line(main))


def start_trainer(command: str, *, section: str) -> None:
  """Runs a trainer, the function with the name of its module, with --config and --workdir.

  Args:
    command: the module's full name; `realm_tf.pretrain` has `pretrain(config, workdir)`.
    section: --workdir is `config.<section>.workdir` by default.
  """
  config = define_config()
  workdir = flags.DEFINE_string(
    "workdir", None, "Folder for checkpoints, logs and snapshots; run again with it to resume."
  )

  def main(argv: Sequence[str]) -> None:
    del argv
    set_switches()
    train = getattr(importlib.import_module(command), command.rpartition(".")[2])
    ownership = importlib.import_module("realm_tf.storage.ownership")  # which imports TensorFlow
    folder = workdir.value or config.value[section].workdir
    with ownership.only_writer(folder):
      print(train(config.value, folder))

  _run(_with_mistakes_in_one_line(main))


def start_job(command: str) -> None:
  """Runs `main(argv)` of a Beam job, with --traceback.

  The module is imported by its name, although it is already being loaded as `__main__`, because
  workers find a DoFn by the name of its module. Every error is one line on standard error, with
  exit code 1.

  Args:
    command: the module's full name.
  """
  flags.disclaim_key_flags()  # the flag is the command's, for --help
  flags.DEFINE_bool(
    "traceback", False, "If the job fails, show the whole traceback instead of one line."
  )

  def main(argv: Sequence[str]) -> None:
    _stop_job_on_ctrl_c()
    set_switches()
    # Beam logs every step of every worker.
    logging.getLogger("apache_beam").setLevel(logging.WARNING)
    try:
      importlib.import_module(command).main(argv)
    except Exception as error:  # any error becomes one line
      if flags.FLAGS.traceback:
        raise
      name = command.rpartition(".")[2]
      sys.exit(f"{name}: {errors.words_of(error)} (run with --traceback for details)")

  _run(main)


def define_config() -> flags.FlagHolder:
  """Defines the required flag --config, a file of configs/, and returns it."""
  from ml_collections import config_flags  # not installed in environments with JAX only

  flags.disclaim_key_flags()  # the flags are the command's, for --help
  config = config_flags.DEFINE_config_file("config", None, "Configuration file.", lock_config=True)
  flags.mark_flag_as_required("config")
  return config


def _run(main: Main) -> None:
  stopping, unwound = threading.Event(), threading.Event()

  def repeat() -> None:
    while not unwound.wait(_REPEAT_SECS):
      os.kill(os.getpid(), signal.SIGINT)

  def stop(*_) -> None:
    """Raises KeyboardInterrupt, and again later if something has swallowed it.

    Python drops what is raised inside callbacks, such as those of its garbage collector, and an
    import may turn it into an error of its own.
    """
    if not stopping.is_set():
      stopping.set()
      threading.Thread(target=repeat, daemon=True).start()
    raise KeyboardInterrupt

  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, stop)
  try:
    app.run(main, flags_parser=_parse_flags)
  except BaseException:
    unwound.set()
    if stopping.is_set():
      _stop()
    raise


def _stop() -> NoReturn:
  """Ends the process on Ctrl-C with one line and the exit code that shells expect.

  It ends at once with its children, as if it were killed. Otherwise each of Beam's threads and
  worker processes would log in many lines that the others are gone.
  """
  print("\nStopped. Run the same command again to resume.", file=sys.stderr, flush=True)
  sys.stdout.flush()
  os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
  _kill_children(os.getpid())
  os._exit(_INTERRUPTED)


def _stop_job_on_ctrl_c() -> None:
  """Starts a thread that waits for Ctrl-C, and then ends this process.

  Threads and processes that are started later do not see Ctrl-C, TensorFlow's and Beam's among
  them. Each of Beam's would log it in many lines.
  """
  signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
  if sys.platform == "linux":  # `sigwait` sees it all the same, but what a shell starts does not
    signal.signal(signal.SIGINT, signal.SIG_IGN)

  def wait() -> None:
    signal.sigwait({signal.SIGINT})
    _stop()

  threading.Thread(target=wait, daemon=True).start()


def _kill_children(pid: int) -> None:
  """Kills the children of a process and their children, on Linux."""
  for path in glob.glob(f"/proc/{pid}/task/*/children"):
    with contextlib.suppress(OSError):  # it has ended by itself
      with open(path, encoding="utf-8") as file:
        children = [int(word) for word in file.read().split()]
      for child in children:
        _kill_children(child)
        os.kill(child, signal.SIGKILL)


def _with_mistakes_in_one_line(main: Main) -> Main:
  def guarded(argv: Sequence[str]) -> None:
    try:
      main(argv)
    except UnicodeEncodeError as error:
      sys.exit(errors.words_of(error))
    except Exception as error:
      if not _is_mendable(error):
        raise
      sys.exit(f"{type(error).__name__}: {errors.plain(str(error))}")

  return guarded


def _is_mendable(error: Exception) -> bool:
  """Whether an error is caused by user input: flags, files, folders."""
  tensorflow = sys.modules.get("tensorflow")  # if None, TensorFlow cannot have raised the error
  mendable = (errors.UserError, OSError, EOFError, json.JSONDecodeError, zipfile.BadZipFile)
  return isinstance(error, (*mendable, tensorflow.errors.OpError) if tensorflow else mendable)


def _parse_flags(argv: Sequence[str]) -> Sequence[str]:
  """Parses flags with Absl; an unknown config key ends the process with one line.

  This line replaces ml_collections' traceback.
  """
  try:
    return app.parse_flags_with_usage(list(argv))
  except (AttributeError, KeyError) as error:
    words = error.args[0]
    while isinstance(words, Exception):
      words = words.args[0]
    sys.exit(f"unknown config key: {'. '.join(str(words).splitlines())}")


# ===================================================================================== the process


def set_switches(*, tensorflow: bool = True, optimize_loops: bool = False) -> None:
  """Applies the settings of the process, before TensorFlow is imported.

  Commands do this when they start, and Beam's worker processes when they import `beam_jobs`.

  Args:
    tensorflow: whether the process uses TensorFlow or Keras, which this imports.
    optimize_loops: whether TensorFlow graphs may have loops, as in third-party models that are
      served.
  """
  # TensorFlow logs its start-up in every process, as errors if there is no GPU; real errors are
  # exceptions. Set this variable to 0 to see everything.
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  # Importing TensorFlow and Keras makes a million permanent objects: collecting garbage after every
  # 700 of them takes a tenth of the start-up time.
  gc.set_threshold(50_000)
  for name in (None, "tensorflow", "apache_beam.runners.portability.local_job_service"):
    logging.getLogger(name).addFilter(_is_no_known_complaint)
  # BM25 logs every step, and JAX, if it is Keras' backend, every missing device.
  for name in ("bm25s", "jax._src.xla_bridge"):
    logging.getLogger(name).addFilter(_is_warning)
  if tensorflow:
    _import_keras_alone()
    import keras

    if keras.backend.backend() == "tensorflow" and not optimize_loops:
      import tensorflow as tf

      # REALM's graphs have no loops, and on ragged ops this optimizer logs warnings that cannot be
      # silenced otherwise.
      tf.config.optimizer.set_experimental_options({"loop_optimization": False})


def _import_keras_alone() -> None:
  """Imports Keras without scikit-learn, matplotlib and JAX, unless JAX is its backend.

  Keras imports them if they are installed. This takes a quarter of the start-up time, and JAX's
  threads do not survive a fork. TensorFlow imports Keras too, so this comes first.
  """
  jax = () if os.environ.get("KERAS_BACKEND") == "jax" else ("jax",)
  with imports.without("sklearn", "matplotlib", *jax):
    import keras  # noqa: F401


def _is_no_known_complaint(record: logging.LogRecord) -> bool:
  message = record.getMessage()
  return not any(complaint in message for complaint in _KNOWN_COMPLAINTS)


def _is_warning(record: logging.LogRecord) -> bool:
  """Filters a library that logs every step, and that sets its own level when it is imported."""
  return record.levelno >= logging.WARNING

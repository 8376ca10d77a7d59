"""How commands start, and that nothing else, such as an import, changes the process."""

import ast
import json
import os
import signal
import subprocess
import sys

import pytest

from realm_tf import cli, errors
from tests import source_code
from tests.processes import REPOSITORY, processes_of_group, wait_until

COMMANDS = [
  f"{package}.{name}".removesuffix(".__main__")
  for package in ("realm_tf", "beam_jobs", "serving", "benchmarks")
  for name, tree in source_code.sources(package).items()
  if "\n  cli.start" in ast.unparse(tree).replace("    cli", "  cli")
]


def python(program: str, *args: str) -> str:
  """Returns the standard output of a program in a process that no command has started."""
  done = subprocess.run(
    [sys.executable, "-c", program, *args], cwd=REPOSITORY, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


# ---------------------------------------------------------------------------------------- importing

# Third-party packages may change anything; ours are compared with what these leave.
_LIBRARIES = (
  "apache_beam.runners.portability.local_job_service",
  "apache_beam.runners.portability.fn_api_runner.worker_handlers",
  *("absl.app", "absl.logging", "aiohttp.web", "apache_beam.io.filesystems", "bm25s", "grpc"),
  *("grpc_health.v1.health", "grpc_reflection.v1alpha.reflection", "keras", "keras_hub"),
  *("matplotlib.pyplot", "ml_collections.config_flags", "prometheus_client", "rich.console"),
  *("scann", "seqeval.metrics", "tensorflow_serving.apis.predict_pb2", "tensorflow_text"),
)

_IMPORT_ALL = """
import gc, importlib, logging, os, sys, warnings
libraries, ours = sys.argv[1].split(), sys.argv[2].split()
for name in libraries:
  importlib.import_module(name)
import tensorflow as tf

loggers = {"": logging.getLogger()} | {
  name: one
  for name, one in logging.Logger.manager.loggerDict.items()
  if isinstance(one, logging.Logger)
}

def state():
  threads = tf.config.threading
  return {
    "garbage collector": (gc.get_threshold(), gc.isenabled(), gc.get_freeze_count()),
    "environment": dict(os.environ),
    "hidden modules": [name for name, module in sys.modules.items() if module is None],
    "warnings": list(warnings.filters),
    "hooks": (sys.excepthook, list(sys.meta_path), list(sys.path), list(sys.argv)),
    "TensorFlow's optimizers": tf.config.optimizer.get_experimental_options(),
    "threads": (
      threads.get_intra_op_parallelism_threads(), threads.get_inter_op_parallelism_threads()
    ),
    "eager functions": tf.config.functions_run_eagerly(),
    "Keras' policy": repr(tf.keras.config.dtype_policy()),
  } | {
    f"logger {name}": (
      one.level, one.disabled, one.propagate, list(one.filters), list(one.handlers)
    )
    for name, one in loggers.items()
  }

before = state()
for name in ours:
  importlib.import_module(name)
  after = state()
  for what in before:
    if before[what] != after[what]:
      print(f"{name}: {what}: {before[what]} -> {after[what]}")
  before = after
"""


def public_modules() -> list[str]:
  return [
    f"{package}.{name}".removesuffix(".__init__")
    for package in ("realm_tf", "beam_jobs", "serving")
    for name in source_code.sources(package)
    if not name.rpartition(".")[2].startswith("_") or name.endswith("__init__")
  ]


def test_importing_changes_nothing():
  modules = public_modules()
  assert len(modules) > 80
  assert python(_IMPORT_ALL, " ".join(_LIBRARIES), " ".join(modules)) == ""


@pytest.mark.parametrize(
  "module", ["realm_tf", "realm_tf.corpus.metrics", "realm_tf.cli", "serving", "beam_jobs"]
)
def test_imports_neither_tensorflow_nor_keras(module):
  heavy = python(f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))")
  assert not {"tensorflow", "keras", "jax", "apache_beam"} & set(json.loads(heavy))


# ----------------------------------------------------------------------------------------- starting


@pytest.mark.parametrize("command", COMMANDS)
def test_help_answers_before_anything_slow_is_imported(command):
  done = subprocess.run(
    [sys.executable, "-X", "importtime", "-m", command, "--help"],
    cwd=REPOSITORY,
    capture_output=True,
    text=True,
  )
  assert "flags:" in done.stdout, done.stdout + done.stderr
  imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
  assert "absl.flags" in imported
  assert not {"tensorflow", "keras", "jax", "apache_beam"} & imported


_SWITCHES = """
import gc, json, logging, os, sys
from realm_tf import cli
assert "keras" not in sys.modules
cli.set_switches(**json.loads(sys.argv[1]))
cli.set_switches(**json.loads(sys.argv[1]))
print(json.dumps({
  "threshold": gc.get_threshold()[0],
  "level": os.environ["TF_CPP_MIN_LOG_LEVEL"],
  "filters": [
    len(logging.getLogger(name).filters)
    for name in (None, "tensorflow", "bm25s", "jax._src.xla_bridge")
  ],
  "modules": [name for name in sys.argv[2].split() if name in sys.modules],
}))
if "tensorflow" in sys.modules:
  import tensorflow as tf
  print(json.dumps(tf.config.optimizer.get_experimental_options()))
"""


@pytest.mark.parametrize(
  "arguments, options",
  [
    ({}, {"loop_optimization": False}),
    ({"optimize_loops": True}, {}),
    ({"tensorflow": False}, None),
  ],
)
def test_switches(arguments, options):
  names = "keras tensorflow sklearn matplotlib jax"
  got, *got_options = map(json.loads, python(_SWITCHES, json.dumps(arguments), names).splitlines())
  assert got == {
    "threshold": 50_000,
    "level": "3",
    "filters": [1, 1, 1, 1],
    "modules": [] if options is None else ["keras", "tensorflow"],
  }
  if options is not None:
    assert got_options == [
      {"disable_meta_optimizer": False, "disable_model_pruning": False, **options}
    ]


def test_commands_do_not_start_jax():
  """Libraries that are imported would, because it is installed here."""
  program = """
import importlib, sys
from realm_tf import cli
cli.set_switches()
for name in sys.argv[1].split():
  importlib.import_module(name)
print(*[name for name in ("sklearn", "matplotlib", "jax", "bm25s") if name in sys.modules])
"""
  commands = "beam_jobs.refresh_index realm_tf.pretrain realm_tf.evaluate serving.model_server"
  assert python(program, commands).split() == ["bm25s"]


def test_a_mistake_is_one_line_and_a_fault_is_a_traceback():
  def fails(error):
    def main(argv):
      raise error

    return cli._with_mistakes_in_one_line(main)

  for error, words in (
    (errors.UserError("no such folder"), "UserError: no such folder"),
    (FileNotFoundError("gone"), "FileNotFoundError: gone"),
    (json.JSONDecodeError("Expecting value", "{", 1), "JSONDecodeError: Expecting value"),
    (EOFError("Compressed file ended before"), "EOFError: Compressed file ended before"),
    (errors.UserError("no \x1b[31m\x9b1m"), r"UserError: no  \[31m 1m"),
    (OSError("no \x1b[31m\x9b1m"), r"OSError: no  \[31m 1m"),
  ):
    with pytest.raises(SystemExit, match=words):
      fails(error)([])
  with pytest.raises(ZeroDivisionError):
    fails(ZeroDivisionError())([])


_INTERRUPTED = """
import os, signal, threading, time
from realm_tf import cli

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it

def work(argv):
  threading.Thread(target=time.sleep, args=[100]).start()  # as Beam's
  threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT]).start()
  time.sleep(100)

def swallow(argv):
  try:
    work(argv)
  except KeyboardInterrupt:
    time.sleep(100)

def turn_into_an_error(argv):
  try:
    work(argv)
  except KeyboardInterrupt:
    raise ImportError("bad install")

def end_in_time(argv):
  try:
    work(argv)
  except KeyboardInterrupt:
    pass

cli._run({main})
"""


@pytest.mark.parametrize(
  "error, wanted",
  [
    (errors.UserError("two\nlines"), "two\nlines"),
    (KeyError("embedding_type"), "missing key: 'embedding_type'"),
    (KeyError("a [while running 'B']"), "missing key: \"a [while running 'B']\""),
    (KeyError(), "KeyError"),
    (ValueError("first\n\nlast\n"), "last"),
    (ValueError(" "), "ValueError"),
  ],
)
def test_an_error_that_ends_a_job_is_told_in_words(error, wanted):
  assert errors.words_of(error) == wanted


@pytest.mark.parametrize(
  "main",
  [
    "work",
    "cli._with_mistakes_in_one_line(work)",
    "swallow",
    "turn_into_an_error",
    "end_in_time",
  ],
)
def test_ctrl_c_is_one_line_and_exit_code_130(main):
  """Also if a callback or an import swallows it."""
  done = subprocess.run(
    [sys.executable, "-c", _INTERRUPTED.format(main=main)],
    cwd=REPOSITORY,
    capture_output=True,
    text=True,
    timeout=30,
  )
  assert done.returncode == 130
  assert done.stderr == "\nStopped. Run the same command again to resume.\n"


@pytest.mark.parametrize(
  "options",
  [(), ("--", "--direct_num_workers=2", "--direct_running_mode=multi_processing")],
  ids=["one process", "two worker processes"],
)
def test_ctrl_c_in_a_job_is_one_line(options, tmp_path):
  """The job ends with its workers, which are in the same process group as with a shell."""
  with open(tmp_path / "a.jsonl", "w") as file:
    for n in range(3000):
      text = f"The mill of Anna Berg was built in {n}. " * 10
      file.write(json.dumps({"title": f"Mill {n}", "text": text}) + "\n")
  flags = [f"--input={tmp_path}/a.jsonl", f"--output={tmp_path}/P", "--passages_per_shard=20"]
  command = [sys.executable, "-m", "beam_jobs.make_passages", *flags, *options]
  words = tmp_path / "words"
  with open(words, "w") as file:
    job = subprocess.Popen(
      command, cwd=REPOSITORY, stdout=file, stderr=file, start_new_session=True
    )
  wait_until(lambda: list(tmp_path.glob(".staging-P/passages-*")), "the first record file")
  os.killpg(job.pid, signal.SIGINT)
  assert job.wait(30) == 130
  wait_until(lambda: not processes_of_group(job.pid), "the end of its workers")
  lines = words.read_text().splitlines()
  assert lines[-1] == "Stopped. Run the same command again to resume." and len(lines) <= 4, lines

"""Fixtures that several tests share: a toy corpus, its config, trained systems, a browser.

The real jobs make the corpus. The config has models of one layer, 16 wide.
"""

import contextlib
import dataclasses
import fcntl
import gc
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import pytest
from ml_collections import config_dict

from realm_tf import cli

# Tests that take long or start processes that do, by the beginnings of their names. The files that
# take longest come first. `make test-fast` leaves these tests out.
SLOW = (
  "pipeline_test.py::test_quickstart",
  "pipeline_test.py::test_own_corpus_without_questions",
  "pretrain_test.py::test_index_is_refreshed",
  "pretrain_test.py::test_what_is_logged",
  "pretrain_test.py::test_own_passage",
  "pretrain_test.py::test_last_snapshot",
  "pretrain_test.py::test_training_moves",
  "pretrain_test.py::test_a_workdir_that_was_warmed_up",
  "pretrain_test.py::test_killed_trainer",
  "pretrain_test.py::test_mistyped",
  "finetune_test.py",
  "servers_under_attack_test.py",
  "writers_test.py",
  "model_server_test.py",
  "accelerator_test.py::test_all_stages",
  "accelerator_test.py::test_losses",
  "speed_test.py::test_sides_",
  "devices_test.py",
  "paper_config_test.py::test_one_step",
  "beam_runners_test.py",
  "import_checkpoint_test.py",
  "export_test.py",
  "real_text_test.py::test_the_command",
  "real_text_test.py::test_ranks",
  "real_text_test.py::test_run_again",
  "evaluate_test.py",
  "explain_test.py",
  "export_hub_test.py",
  "train_tagger_test.py",
  "dataflow_test.py::test_every_job",
  "dataflow_test.py::test_a_",
  "web_test.py",
  "refresh_test.py",
  "moved_run_test.py",
  "moved_pipeline_test.py",
  "end_to_end_test.py",
  "switches_test.py",
  "systems_test.py",
  "make_passages_test.py",
  "tables_test.py::test_memory",
  "embed_passages_test.py",
  "searchers_test.py",
  "loop_test.py",
  "usage_examples_test.py",
  "cli_test.py",
  "attack_kills_test.py",
  "attack_files_test.py",
  "recurring_spans_test.py::test_realm_with",
  "recurring_spans_test.py::test_training",
  "recurring_spans_test.py::test_held_out",
  "lengths_test.py::test_losses",
  "models_test.py::test_jax",
  "holders_test.py::test_two_processes",
  "paper_config_test.py::test_parameter",
)


@dataclasses.dataclass(frozen=True)
class Toy:
  """The built-in corpus with 16 entities.

  It comes with passages, spans, questions, clozes, an untrained ICT workdir with its index, and an
  untrained reader in warm/.
  """

  root: str

  def path(self, *names: str) -> str:
    return os.path.join(self.root, *names)

  @property
  def config_path(self) -> str:
    """Writes a config file for processes, with the same values as `config`."""
    return self.path("toy.py")

  def config(self, **values) -> config_dict.ConfigDict:
    """Returns a fresh config; `values` are dotted names with __ for dots: realm__steps=4."""
    config = toy_config(self.root)
    for name, value in values.items():
      *sections, last = name.split("__")
      part = config
      for section in sections:
        part = part[section]
      part[last] = value
    return config


def index_of(
  articles: Iterable[Mapping[str, str]], folder: Path, *, toy: Toy, snapshot: str, max_tokens: int
) -> str:
  """Makes passages of {"title", "text"} articles and embeds them with a snapshot.

  Returns the index."""
  from beam_jobs import embed_passages, make_passages

  source, passages, index = (str(folder / n) for n in ("articles.jsonl", "passages", "index"))
  with open(source, "w") as file:
    file.writelines(json.dumps(row) + "\n" for row in articles)
  make_passages.run(source, passages, vocab=toy.config().passages, max_tokens=max_tokens)
  embed_passages.embed(index, snapshot=snapshot, passages_folder=passages, jit_compile=False)
  return index


def pytest_configure() -> None:
  """Sets the switches that commands set. No test is imported yet, so neither is TensorFlow."""
  # Models are tiny here: more threads cost more than they save. Processes of tests inherit this.
  os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
  cli.set_switches()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Marks slow tests and runs their files first: both workers end at about the same time."""
  files = [name.partition("::")[0] for name in SLOW]

  def place(item: pytest.Item) -> int:
    return files.index(item.path.name) if item.path.name in files else len(files)

  for item in items:
    if f"{item.path.name}::{item.name}".startswith(SLOW):
      item.add_marker(pytest.mark.slow)
  items.sort(key=place)


def toy_config(root: str) -> config_dict.ConfigDict:
  """Returns configs/quickstart.py with tiny sizes."""
  from configs import quickstart

  c = quickstart.get_config()
  c.run_dir = root
  c.encoder.update(num_layers=1, num_heads=2, hidden_dim=16, intermediate_dim=32)
  c.retriever.projection_dim = 8
  c.mlm.steps = 0
  c.ict.update(steps=0, batch_size=4, log_every=2, checkpoint_every=2)
  c.warmup.update(steps=2, batch_size=4, log_every=2, checkpoint_every=2)
  c.realm.update(steps=8, batch_size=4, log_every=2, checkpoint_every=4, num_candidates=3)
  c.refresh.update(every_steps=4, job_args=("--poll_secs=0.1", "--nojit_compile"))
  c.finetune.update(
    steps=4,
    batch_size=4,
    beam=8,
    num_read=2,
    span_dim=8,
    log_every=2,
    checkpoint_every=2,
    sync_steps=2,
    retriever=root + "/ict",
    reader=root + "/warm",
  )
  return c


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
  """Runs eagerly: for a few steps, tracing and optimising a graph takes longer than the steps."""
  import tensorflow as tf

  tf.config.run_functions_eagerly(True)
  try:
    with warnings.catch_warnings():
      # tf.data warns that it makes graphs all the same
      warnings.filterwarnings("ignore", "Even though the", UserWarning)
      yield
  finally:
    tf.config.run_functions_eagerly(False)


@pytest.fixture(scope="module", autouse=True)
def clean_process() -> Iterator[None]:
  """Fresh weights, and collections of garbage, are the same whichever files a worker ran before."""
  import keras

  keras.utils.set_random_seed(0)
  yield
  gc.collect()
  gc.freeze()  # graphs and models that stay: to look through them again and again takes minutes


def made_once(tmp_path_factory, name: str, make: Callable[[str], None]) -> str:
  """Returns a folder that the first worker makes and all workers read.

  Args:
    tmp_path_factory: pytest's.
    name: of the folder.
    make: fills it, given its path.
  """
  root = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    root = root.parent  # each worker has a folder in it
  folder = str(root / name)
  with open(f"{folder}.lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not os.path.exists(f"{folder}.made"):
      shutil.rmtree(folder, ignore_errors=True)  # what made another worker fail
      os.mkdir(folder)
      make(folder)
      Path(f"{folder}.made").touch()
  return folder


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Toy:
  return Toy(made_once(tmp_path_factory, "toy", _make_toy))


def _make_toy(root: str) -> None:
  from beam_jobs import annotate_spans, embed_passages, make_passages
  from quickstart_corpus import generate
  from realm_tf import pretrain_ict, settings
  from realm_tf.corpus import passages
  from realm_tf.models import snapshots
  from realm_tf.storage import artifacts
  from realm_tf.training import new_models

  toy = Toy(root)
  generate.generate(toy.path("corpus"), seed=0, num_entities=16)
  config = toy.config()
  make_passages.run(
    config.corpus.knowledge,
    config.passages,
    vocab_input=config.corpus.pretraining,
    vocab_size=600,
    max_tokens=config.corpus.max_tokens,
  )
  make_passages.run(
    config.corpus.pretraining,
    toy.path("passages-pretraining"),
    vocab=config.passages,
    max_tokens=config.corpus.max_tokens,
  )
  annotate_spans.run(config.passages, config.knowledge_spans)
  annotate_spans.run(toy.path("passages-pretraining"), config.spans)
  snapshot = pretrain_ict.pretrain_ict(config, config.ict.workdir)
  embed_passages.embed(
    toy.path("ict/indexes/00000000"),
    snapshot=snapshot,
    passages_folder=config.passages,
    jit_compile=False,
  )
  tokenizer = passages.load_tokenizer(config.passages)
  snapshots.publish(
    toy.path("warm/snapshots"),
    0,
    {"reader": new_models.new_masked_reader(settings.masked_reader_start(config), tokenizer)},
    tokenizer=tokenizer,
    made_by="test",
  )
  artifacts.write_text(
    toy.config_path,
    "from tests.conftest import toy_config\n\n"
    f"def get_config():\n  return toy_config({toy.root!r})\n",
  )


@pytest.fixture(scope="session")
def overlapping(toy, tmp_path_factory) -> str:
  """Spans of a separate corpus X.

  X is every third article of the toy's Z, and some that Z lacks.
  """
  from beam_jobs import annotate_spans, make_passages

  config, root = toy.config(), str(tmp_path_factory.mktemp("overlapping"))
  folder = config.corpus.knowledge
  lines = [line for name in sorted(os.listdir(folder)) for line in open(os.path.join(folder, name))]
  with open(f"{root}/x.jsonl", "w") as file:
    file.writelines(lines[::3] + [line.replace("The ", "This ") for line in lines[1::6]])
  make_passages.run(
    f"{root}/x.jsonl", f"{root}/X", vocab=config.passages, max_tokens=config.corpus.max_tokens
  )
  annotate_spans.run(f"{root}/X", f"{root}/spans")
  return f"{root}/spans"


@pytest.fixture(scope="session")
def fine_tuned(toy, tmp_path_factory) -> dict[str, str]:
  """System → its workdir after four steps of fine-tuning.

  The dense system has its own index, in base/, because a test exchanges it.
  """
  import keras

  from tests import fine_tuning

  root = str(tmp_path_factory.mktemp("fine_tuned"))
  found = {system: os.path.join(root, system) for system in fine_tuning.SYSTEMS}
  base = os.path.join(found["dense"], "base")
  shutil.copytree(toy.path("ict"), base)
  keras.utils.set_random_seed(0)
  for system, workdir in found.items():
    with eagerly():
      fine_tuning.fine_tune(toy, workdir, system, finetune__retriever=base)
  return found


@pytest.fixture(scope="session")
def served_workdirs(toy, tmp_path_factory) -> dict[str, str]:
  """A pre-trained workdir of fresh models with its index, and two systems.

  One is fine-tuned from it for a few steps; the other is a baseline.
  """

  def make(root: str) -> None:
    _make_served_workdirs(toy, root)

  root = made_once(tmp_path_factory, "served_workdirs", make)
  return {name: os.path.join(root, name) for name in ("pretrained", "dense", "bm25")}


def _make_served_workdirs(toy: Toy, root: str) -> None:
  import keras

  from beam_jobs import embed_passages
  from realm_tf import finetune, settings
  from realm_tf.corpus import passages
  from realm_tf.models import snapshots
  from realm_tf.training import new_models
  from tests.servables import STEPS

  pretrained, dense, bm25 = (os.path.join(root, name) for name in ("pretrained", "dense", "bm25"))
  config = toy.config()
  keras.utils.set_random_seed(0)
  tokenizer = passages.load_tokenizer(config.passages)
  models = {
    "retriever": snapshots.load_retriever(toy.path("ict/snapshots/00000000")),
    "reader": new_models.new_masked_reader(settings.masked_reader_start(config), tokenizer),
  }
  snapshot = snapshots.publish(
    pretrained + "/snapshots", 3, models, tokenizer=tokenizer, made_by="pretrain"
  )
  embed_passages.embed(
    pretrained + "/indexes/00000003",
    snapshot=snapshot,
    passages_folder=config.passages,
    jit_compile=False,
  )
  finetune.finetune(
    toy.config(
      finetune__retriever=pretrained,
      finetune__reader=pretrained,
      finetune__steps=STEPS,
      finetune__log_every=STEPS,
      finetune__checkpoint_every=STEPS,
      finetune__learning_rate=1e-2,
    ),
    dense,
  )
  snapshots.publish(
    bm25 + "/snapshots",
    4,
    {"reader": models["reader"]},
    tokenizer=tokenizer,
    made_by="finetune",
    details={"retrieval": "bm25"},
  )


@pytest.fixture(scope="session")
def asked(toy) -> list:
  """All questions of the toy corpus, the test part first."""
  from realm_tf.examples import questions

  return [
    row
    for part in ("test", "train")
    for row in questions.read_questions(toy.path(f"corpus/questions.{part}.jsonl"))
  ]


@pytest.fixture(scope="session")
def servable(served_workdirs, tmp_path_factory) -> str:
  """The exported dense system."""
  from serving import export
  from tests.servables import NUM_ANSWERS, NUM_CANDIDATES

  def make(folder: str) -> None:
    export.export(
      served_workdirs["dense"], folder, num_answers=NUM_ANSWERS, num_candidates=NUM_CANDIDATES
    )

  return export.newest_version(made_once(tmp_path_factory, "servables", make))


@pytest.fixture(scope="session")
def loaded(servable):
  """The servable, loaded in this process."""
  import tensorflow as tf

  return tf.saved_model.load(servable)


@pytest.fixture(scope="session")
def answerer(served_workdirs):
  """The system that `servable` was exported from, opened as evaluation does."""
  from realm_tf.systems.question_answering import QuestionAnswering
  from realm_tf.systems.workdir import open_workdir

  return QuestionAnswering(open_workdir(served_workdirs["dense"]))


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
  """A headless Chromium."""
  from selenium import webdriver

  if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
    pytest.skip("no browser: apt-get install chromium chromium-driver")
  options = webdriver.ChromeOptions()
  for argument in (
    "headless",
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
    "hide-scrollbars",
    "force-prefers-reduced-motion",
    f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
  ):
    options.add_argument(f"--{argument}")
  options.binary_location = shutil.which("chromium")
  options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
  driver = webdriver.Chrome(
    options=options, service=webdriver.ChromeService(shutil.which("chromedriver"))
  )
  driver.set_window_size(1100, 1000)
  yield driver
  driver.quit()

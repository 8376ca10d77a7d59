"""What several tests share: a toy corpus made by the real jobs, and a config of one layer x 16 wide for it."""

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Iterator

import pytest
from ml_collections import config_dict

from realm_tf import artifacts


@dataclasses.dataclass(frozen=True)
class Toy:
  """The built-in corpus at 16 entities: passages, spans, questions, clozes, an untrained ICT workdir with its index, and an untrained reader in warm/."""

  root: str

  def path(self, *names: str) -> str:
    return os.path.join(self.root, *names)

  @property
  def config_path(self) -> str:
    """A config file for processes, of the same values as `config`."""
    return self.path("toy.py")

  def config(self, **values) -> config_dict.ConfigDict:
    """A fresh config; `values` are dotted names with __ for dots: realm__steps=4."""
    config = toy_config(self.root)
    for name, value in values.items():
      *sections, last = name.split("__")
      part = config
      for section in sections:
        part = part[section]
      part[last] = value
    return config


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """The slow files first, so that two workers end at about the same time."""
  items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def toy_config(root: str) -> config_dict.ConfigDict:
  """configs/quickstart.py, tiny."""
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
  c.finetune.update(steps=4, batch_size=4, beam=8, num_read=2, span_dim=8, log_every=2, checkpoint_every=2, sync_steps=2,
                    retriever=root + "/ict", reader=root + "/warm")
  return c


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
  """For a training of a few steps: to trace and optimise its graph takes longer than they do."""
  import tensorflow as tf

  tf.config.run_functions_eagerly(True)
  try:
    with warnings.catch_warnings():
      warnings.filterwarnings("ignore", "Even though the", UserWarning)  # tf.data says that it makes graphs all the same
      yield
  finally:
    tf.config.run_functions_eagerly(False)


@pytest.fixture(scope="module", autouse=True)
def seed() -> None:
  """Fresh weights are the same whichever files a worker ran before."""
  import keras

  keras.utils.set_random_seed(0)


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Toy:
  from beam_jobs import annotate_spans, embed_passages, make_passages
  from quickstart_corpus import generate
  from realm_tf import pretrain_ict, settings, snapshots

  toy = Toy(str(tmp_path_factory.mktemp("toy")))
  generate.generate(toy.path("corpus"), seed=0, num_entities=16)
  config = toy.config()
  make_passages.run(config.corpus.knowledge, config.passages, vocab_input=config.corpus.pretraining, vocab_size=600,
                    max_tokens=config.corpus.max_tokens)
  make_passages.run(config.corpus.pretraining, toy.path("passages-pretraining"), vocab=config.passages,
                    max_tokens=config.corpus.max_tokens)
  annotate_spans.run(config.passages, config.knowledge_spans)
  annotate_spans.run(toy.path("passages-pretraining"), config.spans)
  snapshot = pretrain_ict.pretrain_ict(config, config.ict.workdir)
  embed_passages.embed(toy.path("ict/indexes/00000000"), snapshot=snapshot, passages_folder=config.passages, jit_compile=False)
  tokenizer = settings.tokenizer(config.passages)
  snapshots.publish(toy.path("warm/snapshots"), 0, {"reader": settings.new_masked_reader(config, tokenizer)}, tokenizer=tokenizer, made_by="test")
  artifacts.write_text(
      toy.config_path, f"from tests.conftest import toy_config\n\ndef get_config():\n  return toy_config({toy.root!r})\n")
  return toy


@pytest.fixture(scope="session")
def overlapping(toy, tmp_path_factory) -> str:
  """Spans of an X in a folder of its own: every third article of the toy's Z, and some that Z lacks."""
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

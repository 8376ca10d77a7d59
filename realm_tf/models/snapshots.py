"""Snapshots: a trainer's weights, published as folders that any job can open."""

import math
import os
import tempfile
from collections.abc import Callable, Mapping

import keras

from realm_tf.corpus import vocabularies
from realm_tf.corpus.tokenization import Tokenizer
from realm_tf.models.masked_reader import MaskedReader
from realm_tf.models.retriever import Retriever
from realm_tf.models.span_reader import SpanReader
from realm_tf.storage import artifacts, integrity, publishing

KIND = "snapshot"
_HDF5_BYTES = 4096  # at most, in addition to a variable's values
_CLASSES = {cls.__name__: cls for cls in (Retriever, MaskedReader, SpanReader)}


def publish(
  root: str,
  step: int,
  models: Mapping[str, keras.Model],
  *,
  tokenizer: Tokenizer,
  made_by: str,
  details: Mapping = {},
  inputs: Mapping[str, str] = {},
) -> str:
  """Writes `root/<step>`: each model's config and weights, and the vocabulary.

  Args:
    root: folder of the snapshots.
    step: training step; names the snapshot.
    models: "retriever" and "reader", or one of them.
    tokenizer: the models' tokenizer, which has the vocabulary.
    made_by: the trainer's name, for info.json.
    details: further fields of info.json.
    inputs: artifacts that readers of this snapshot need: "passages", and the "index" it was
      fine-tuned with.

  Returns:
    The snapshot's folder.
  """
  folder = artifacts.step_folder(root, step)
  config = {
    name: {"class": type(model).__name__, "config": model.get_config()}
    for name, model in models.items()
  }
  with publishing.publish(folder, kind=KIND, config=config, inputs=inputs) as staged:
    digests = []
    for name, model in models.items():
      file = f"{name}.weights.h5"
      save_weights(model, os.path.join(staged.path, file))
      staged.files[file] = integrity.describe(os.path.join(staged.path, file))
      digests.append(staged.files[file]["sha256"])
    vocabularies.write(staged.path, tokenizer.pieces)
    staged.content = artifacts.fingerprint_of(digests)
    staged.details = {"step": step, "made_by": made_by, **tokenizer.details, **details}
  return folder


def publisher(
  models: Mapping[str, keras.Model],
  *,
  tokenizer: Tokenizer,
  made_by: str,
  details: Mapping = {},
  inputs: Mapping[str, str] = {},
) -> Callable[[str, int, Mapping], str]:
  """Returns a function that publishes the models as they then are, for trainers.

  It takes root, step and further fields of info.json, and returns the snapshot's folder. See
  `publish` for the arguments.
  """

  def write_snapshot(root: str, step: int, more: Mapping) -> str:
    return publish(
      root,
      step,
      models,
      tokenizer=tokenizer,
      made_by=made_by,
      details={**details, **more},
      inputs=inputs,
    )

  return write_snapshot


def newest(workdir: str, *, advice: str) -> str:
  """Returns the newest snapshot of a trainer's workdir.

  Args:
    workdir: workdir of the trainer.
    advice: what to do if there is none; ends the message.

  Raises:
    ArtifactError: there is none.
  """
  folder = artifacts.latest(os.path.join(workdir, "snapshots"))
  if folder is None:
    raise artifacts.ArtifactError(f"no snapshot in {workdir!r}; {advice}")
  return folder


def load_retriever(folder: str) -> Retriever:
  """Loads the retriever of a snapshot.

  Raises:
    ArtifactError: the snapshot is incomplete, damaged or has no retriever.
  """
  return load_model(folder, "retriever")


def load_model(folder: str, name: str) -> keras.Model:
  """Loads one model of a snapshot by name ("retriever" or "reader")."""
  config = model_config(folder, name)
  model = _CLASSES[config["class"]](**config["config"])
  load_weights(model, os.path.join(folder, f"{name}.weights.h5"))
  return model


def model_config(folder: str, name: str) -> dict:
  """Class and config of one model of a snapshot."""
  config = artifacts.read_info(folder, kind=KIND)["config"]
  if name not in config:
    raise artifacts.ArtifactError(f"snapshot {folder!r} holds {', '.join(config)}; wanted {name}.")
  return config[name]


def load_tokenizer(folder: str) -> Tokenizer:
  """Loads the tokenizer that the snapshot's models were trained with."""
  artifacts.read_info(folder, kind=KIND)
  integrity.check_digests(folder, [vocabularies.VOCAB])
  return Tokenizer(folder)


def save_weights(model: keras.Model, path: str) -> None:
  """Saves weights to any `tf.io.gfile` path (HDF5 itself writes local files only).

  Raises:
    OSError: the disk for temporary files is full.
  """
  optimizer = getattr(model, "optimizer", None)  # a compiled model's slots are saved too
  variables = [*model.variables, *(optimizer.variables if optimizer else ())]
  size = sum(4 * math.prod(variable.shape) + _HDF5_BYTES for variable in variables)
  with tempfile.TemporaryDirectory() as scratch:
    local = os.path.join(scratch, "model.weights.h5")
    with open(local, "wb") as file:  # HDF5 crashes the process if the disk is full
      os.posix_fallocate(file.fileno(), 0, size)
    model.save_weights(local)
    artifacts.gfile.copy(local, path, overwrite=True)


def load_weights(model: keras.Model, path: str) -> None:
  """Loads weights that `save_weights` saved.

  Raises:
    ArtifactError: the file has changed since it was published.
  """
  folder, name = os.path.split(path)
  integrity.check_digests(folder, [name])
  with tempfile.TemporaryDirectory() as scratch:
    local = os.path.join(scratch, "model.weights.h5")
    artifacts.gfile.copy(path, local)
    model.load_weights(local)

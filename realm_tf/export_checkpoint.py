"""Exports a workdir as folders that the Realm classes of transformers load.

transformers 4.39.3 is the last release that has these classes.

    python -m realm_tf.export_checkpoint --workdir=W --format=huggingface --output=DIR

A pre-trained workdir gives DIR/embedder, DIR/scorer and DIR/encoder; a fine-tuned one DIR/embedder,
DIR/scorer, DIR/reader and DIR/openqa, with block_emb and block_records.npy. Models that
transformers has no class for are left out, and the reason is printed. The masked-LM heads that its
embedder and reader have but do not use are left out too; transformers then reports that it makes
new ones.
"""

import itertools
import json
import os
from collections.abc import Mapping, Sequence

from absl import flags

from realm_tf import cli

if __name__ == "__main__":
  flags.DEFINE_string(
    "workdir", None, "A workdir of a trainer or of realm_tf.import_checkpoint.", required=True
  )
  flags.DEFINE_enum("format", "huggingface", ["huggingface"], "The format to write.")
  flags.DEFINE_string("output", None, "The folder to write the exported folders to.", required=True)
  cli.start("realm_tf.export_checkpoint")

import numpy as np

from realm_tf.checkpoints import huggingface_files, published_models, published_names
from realm_tf.checkpoints.published_names import Slots
from realm_tf.checkpoints.tensor_files import Tensor, Tensors
from realm_tf.corpus import vocabularies
from realm_tf.corpus.tokenization import Tokenizer
from realm_tf.models import encoder, snapshots
from realm_tf.models.masked_reader import MaskedReader
from realm_tf.models.retriever import Retriever
from realm_tf.models.span_reader import SpanReader
from realm_tf.retrieval import index
from realm_tf.storage import artifacts, ownership, publishing
from realm_tf.systems.workdir import (
  DENSE,
  SnapshotInfo,
  Workdir,
  newest_snapshot,
  open_workdir,
)

KIND = "exported checkpoint"


def export(workdir: str, output: str) -> list[str]:
  """Writes the folders of a workdir's newest snapshot; returns their paths.

  Raises:
    ArtifactError: there is no snapshot, or its index or passages are missing.
    UserError: transformers has no class for any of its models.
  """
  info = newest_snapshot(
    workdir, advice="give the workdir of a trainer, or of realm_tf.import_checkpoint."
  )
  for name in ("embedder", "scorer", "encoder", "reader", "openqa"):
    ownership.check_output(os.path.join(output, name), kind=KIND, reads=[info.folder])
  models = {name: snapshots.load_model(info.folder, name) for name in info.models}
  retriever, reader = models.get("retriever"), models.get("reader")
  if retriever and not _is_retriever_of_transformers(retriever):
    retriever = None
  folders = _Folders(output, info)
  if retriever:
    _write_retriever(folders, retriever)
  if isinstance(reader, MaskedReader) and _is_encoder_of_transformers(reader):
    slots = published_names.masked_reader_slots(reader)
    folders.write("encoder", "RealmKnowledgeAugEncoder", _tensors(slots), reader)
  if isinstance(reader, SpanReader):
    slots = published_names.span_reader_slots(reader)
    folders.write("reader", "RealmReader", _tensors(slots), reader, reader_beam_size=info.num_read)
    if retriever and _bert_config(retriever) != _bert_config(reader):
      print(
        "export_checkpoint: no openqa: its embedder and reader must have the same sizes in "
        "transformers, but differ here."
      )
    elif retriever and info.retrieval == DENSE and not _has_passages(info, workdir):
      print(f"export_checkpoint: no openqa: there is no index in {workdir!r}.")
    elif retriever and info.retrieval == DENSE:
      _write_openqa(folders, retriever, reader, opened=open_workdir(workdir, snapshot=info))
  if not folders.written:
    raise artifacts.UserError(
      f"transformers has no class for anything in {info.folder!r} ({', '.join(info.models)})."
    )
  return folders.written


def _is_retriever_of_transformers(retriever: Retriever) -> bool:
  """Returns whether transformers can compute what the retriever does; prints what differs."""
  if retriever.get_config()["norm_epsilon"]:
    epsilon = encoder.layer_norm_epsilon(retriever.get_config()["architecture"])
    print(
      "export_checkpoint: the projection's layer norm has Keras' epsilon 1e-3; transformers has "
      f"one epsilon for all and uses {epsilon:g} there: its vectors will differ slightly."
    )
  if retriever.pooling != "cls":
    print(
      "export_checkpoint: no embedder, scorer or openqa: the retriever pools by "
      f"{retriever.pooling!r}, but transformers by 'cls' only."
    )
  return retriever.pooling == "cls"


def _has_passages(info: SnapshotInfo, workdir: str) -> bool:
  """Whether a fine-tuned system belongs to passages; a checkpoint may be imported without any."""
  own = index.folder_of(workdir, info.folder)
  return "passages" in info.inputs or artifacts.is_complete(own)


def _is_encoder_of_transformers(reader: MaskedReader) -> bool:
  if reader.pointer is not None:
    print(
      "export_checkpoint: no encoder: the reader copies from the passage, which transformers' "
      "encoder cannot."
    )
  return reader.pointer is None


class _Folders:
  """Writes folders below `output`.

  Args:
    output: the folder that holds them.
    info: the snapshot that they come from.

  Attributes:
    written: the folders.
  """

  def __init__(self, output: str, info: SnapshotInfo):
    self.info, self.written = info, list[str]()
    self._output, self._tokenizer = output, snapshots.load_tokenizer(info.folder)

  def write(
    self,
    name: str,
    architecture: str,
    tensors: Tensors,
    *of: Retriever | MaskedReader | SpanReader,
    block_records: Sequence[str] = (),
    **values,
  ) -> None:
    """Writes one folder.

    Args:
      name: of the folder.
      architecture: transformers' class.
      tensors: its weights.
      *of: the models that they come from.
      block_records: texts of passages that belong to it.
      **values: further fields of config.json.
    """
    folder, config = os.path.join(self._output, name), {"architecture": architecture}
    pad_row = self.info.pad_row
    with publishing.publish(
      folder, kind=KIND, config=config, inputs={"snapshot": self.info.folder}
    ) as staged:
      write_folder(
        staged.path,
        architecture,
        published_names.with_pieces_swapped(tensors, pad_row),
        config_of(*of) | {"pad_token_id": pad_row} | values,
        self._tokenizer,
        pad_row=pad_row,
      )
      if block_records:
        write_block_records(staged.path, block_records)
    print(f"export_checkpoint: {folder}: {architecture}, {len(tensors)} tensors")
    self.written.append(folder)


def _write_retriever(folders: _Folders, retriever: Retriever) -> None:
  query, passage = retriever.query_tower, retriever.passage_tower
  folders.write(
    "embedder", "RealmEmbedder", _tensors(published_names.embedder_slots(passage)), retriever
  )
  both = published_names.embedder_slots(passage, "embedder.") | published_names.embedder_slots(
    query, "query_embedder."
  )
  folders.write("scorer", "RealmScorer", _tensors(both), retriever)


def _write_openqa(
  folders: _Folders, retriever: Retriever, reader: SpanReader, *, opened: Workdir
) -> None:
  table, embeddings = opened.table, read_index(opened.searched_index)
  if len(table.deleted):  # transformers would find them
    raise artifacts.UserError(
      f"{table.folder!r} has the rows of {len(table.deleted)} deleted passages, which the format "
      "cannot leave out. Run beam_jobs.update_passages --compact, and make the index again."
    )
  slots = published_names.embedder_slots(
    retriever.query_tower, "embedder."
  ) | published_names.span_reader_slots(reader, "reader.")
  folders.write(
    "openqa",
    "RealmForOpenQA",
    _tensors(slots) | {published_names.BLOCK_EMBEDDINGS: embeddings},
    retriever,
    reader,
    block_records=table.texts,
    reader_beam_size=folders.info.num_read,
    num_block_records=len(table),
    searcher_beam_size=min(5000, len(table)),
  )


def _tensors(slots: Slots) -> dict[str, Tensor]:
  return {name: Tensor.of(slot.get()) for name, slot in slots.items()}


def _bert_config(model: Retriever | MaskedReader | SpanReader) -> dict:
  """Returns a model's fields of transformers' config.json."""
  sizes = model.get_config()["architecture"]
  return {
    "vocab_size": sizes["vocabulary_size"],
    "hidden_size": sizes["hidden_dim"],
    "num_hidden_layers": sizes["num_layers"],
    "num_attention_heads": sizes["num_heads"],
    "intermediate_size": sizes["intermediate_dim"],
    "type_vocab_size": 2,
    "max_position_embeddings": sizes["max_sequence_length"],
    "hidden_dropout_prob": sizes["dropout"],
    "attention_probs_dropout_prob": sizes["dropout"],
    "hidden_act": published_models.hidden_act_of(sizes),
    "layer_norm_eps": encoder.layer_norm_epsilon(sizes),
  }


def config_of(*models: Retriever | MaskedReader | SpanReader) -> dict:
  """Returns transformers' config.json for these models together."""
  config: dict[str, object] = {"model_type": "realm", "torch_dtype": "float32"}
  for model in models:
    config |= _bert_config(model)
    if isinstance(model, Retriever):
      config |= {"retriever_proj_size": model.dim}
    elif isinstance(model, SpanReader):
      told = model.get_config()
      config |= {
        "span_hidden_size": told["span_dim"],
        "max_span_width": told["max_span"],
        "reader_seq_len": told["length"],
        "reader_layer_norm_eps": told["norm_epsilon"],
      }
  return config


def read_index(folder: str) -> Tensor:
  """Returns all embeddings of an index as one tensor [N, D], read one file at a time."""
  artifacts.read_info(folder, kind=index.KIND)
  paths = index.shard_paths(folder)
  shapes = [index.shard_shape(path) for path in paths]
  starts = np.cumsum([0, *(num_rows for num_rows, _ in shapes)])

  def rows(start: int, stop: int) -> np.ndarray:
    parts = [
      index.read_shard(path)[max(start - first, 0) : stop - first]
      for path, (first, last) in zip(paths, itertools.pairwise(starts), strict=True)
      if first < stop and start < last
    ]
    return np.concatenate(parts).astype(np.float32)

  return Tensor((int(starts[-1]), shapes[0][1]), folder, rows)


def write_folder(
  folder: str,
  architecture: str,
  tensors: Tensors,
  config: Mapping,
  tokenizer: Tokenizer,
  *,
  pad_row: int,
) -> None:
  """Writes config.json, model.safetensors and the tokenizer's files."""
  rules = tokenizer.rules
  texts = {
    "config.json": json.dumps({"architectures": [architecture], **config}, indent=2) + "\n",
    "tokenizer_config.json": json.dumps(
      {
        "do_lower_case": rules.lower_case,
        "strip_accents": rules.strip_accents,
        "tokenize_chinese_chars": rules.split_cjk,
        "clean_text": rules.clean_text,
        "tokenizer_class": "RealmTokenizer",
      }
    )
    + "\n",
  }
  for name, text in texts.items():
    artifacts.write_text(os.path.join(folder, name), text)
  pieces = list(tokenizer.pieces)
  pieces[0], pieces[pad_row] = pieces[pad_row], pieces[0]
  vocabularies.write(folder, pieces)
  huggingface_files.write_safetensors(os.path.join(folder, "model.safetensors"), tensors)


def write_block_records(folder: str, texts: Sequence[str]) -> None:
  """Writes block_records.npy, the text of the embedded passages pickled as in transformers."""
  records = np.empty(len(texts), object)
  records[:] = [text.encode() for text in texts]
  with artifacts.gfile.GFile(os.path.join(folder, "block_records.npy"), "wb") as file:
    np.save(file, records, allow_pickle=True)


def main(argv: Sequence[str]) -> None:
  del argv
  export(flags.FLAGS.workdir, flags.FLAGS.output)

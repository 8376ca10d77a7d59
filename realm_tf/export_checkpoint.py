"""A workdir of ours as folders that the Realm classes of transformers (4.39.3 is the last release that has them) load.

    python -m realm_tf.export_checkpoint --workdir=W --format=huggingface --output=DIR

A pre-trained workdir gives DIR/embedder, DIR/scorer and DIR/encoder, a fine-tuned one DIR/embedder, DIR/scorer, DIR/reader and
DIR/openqa, with block_emb and block_records.npy. What transformers has no class for is left out, with the reason. The masked-LM
heads that its embedder and reader carry and do not use are left out too: it says then that it makes new ones.
"""

import json
import os
from collections.abc import Mapping, Sequence

import numpy as np
from absl import flags

from realm_tf import (
    artifacts, checkpoints, index, ownership, passages, published, settings, snapshots, vocabularies)
from realm_tf.checkpoints import Tensor, Tensors
from realm_tf.models import encoder
from realm_tf.models.masked_reader import MaskedReader
from realm_tf.models.retriever import Retriever
from realm_tf.models.span_reader import SpanReader
from realm_tf.published import Slots
from realm_tf.tokenization import Tokenizer

KIND = "exported checkpoint"


def export(workdir: str, output: str) -> list[str]:
  """Writes the folders of a workdir's newest snapshot; returns their paths.

  Raises:
    ArtifactError: no snapshot, or its index or passages are missing.
    UserError: nothing in it that transformers has a class for.
  """
  snapshot = snapshots.newest(workdir, advice="give the workdir of a trainer, or of realm_tf.import_checkpoint.")
  for name in ("embedder", "scorer", "encoder", "reader", "openqa"):
    ownership.check_output(os.path.join(output, name), kind=KIND, reads=[snapshot])
  info, tokenizer = artifacts.read_info(snapshot), snapshots.load_tokenizer(snapshot)
  models = {name: snapshots.load_model(snapshot, name) for name in info["config"]}
  retriever, reader, written = models.get("retriever"), models.get("reader"), []
  if retriever and retriever.get_config()["norm_epsilon"]:
    print("export_checkpoint: the projection's layer norm has Keras' epsilon 1e-3; transformers knows one epsilon and takes "
          f"{encoder.layer_norm_epsilon(retriever.get_config()['architecture']):g} there: its vectors will differ a little.")
  if retriever and retriever.pooling != "cls":
    print(f"export_checkpoint: no embedder, scorer or openqa: the retriever pools by {retriever.pooling!r}, transformers by 'cls' only.")
    retriever = None
  if isinstance(reader, MaskedReader) and reader.pointer is not None:
    print("export_checkpoint: no encoder: the reader copies from the passage, which transformers' cannot.")
    reader = None

  pad_row = info.get("pad_row", 0)  # where the imported vocabulary had [PAD]

  def write(name: str, architecture: str, tensors: Tensors, *of, block_records: Sequence[str] = (), **values) -> None:
    folder, config = os.path.join(output, name), {"architecture": architecture}
    with artifacts.publish(folder, kind=KIND, config=config, inputs={"snapshot": snapshot}) as staged:
      write_folder(
          staged.path, architecture, published.with_pieces_swapped(tensors, pad_row),
          config_of(*of) | {"pad_token_id": pad_row} | values, tokenizer, pad_row=pad_row)
      if block_records:
        write_block_records(staged.path, block_records)
    print(f"export_checkpoint: {folder}: {architecture}, {len(tensors)} tensors")
    written.append(folder)

  if retriever:
    query, passage = retriever.query_tower, retriever.passage_tower
    write("embedder", "RealmEmbedder", _tensors(published.embedder_slots(passage)), retriever)
    both = published.embedder_slots(passage, "embedder.") | published.embedder_slots(query, "query_embedder.")
    write("scorer", "RealmScorer", _tensors(both), retriever)
  if isinstance(reader, MaskedReader):
    write("encoder", "RealmKnowledgeAugEncoder", _tensors(published.masked_reader_slots(reader)), reader)
  if isinstance(reader, SpanReader):
    write("reader", "RealmReader", _tensors(published.span_reader_slots(reader)), reader, reader_beam_size=info["num_read"])
    if retriever and _bert_config(retriever) != _bert_config(reader):
      print("export_checkpoint: no openqa: its embedder and reader have one size in transformers, here they differ.")
    elif retriever and info.get("retrieval") == "dense":
      embeddings = read_index(index.of_snapshot(workdir, snapshot))
      table = passages.load(artifacts.find_input(snapshot, "passages"))
      slots = published.embedder_slots(query, "embedder.") | published.span_reader_slots(reader, "reader.")
      write("openqa", "RealmForOpenQA", _tensors(slots) | {published.BLOCK_EMBEDDINGS: embeddings}, retriever, reader,
            block_records=table.texts, reader_beam_size=info["num_read"], num_block_records=len(table),
            searcher_beam_size=min(5000, len(table)))
  if not written:
    raise artifacts.UserError(f"transformers has no class for anything in {snapshot!r} ({', '.join(info['config'])}).")
  return written


def _tensors(slots: Slots) -> dict[str, Tensor]:
  return {name: Tensor.of(slot.get()) for name, slot in slots.items()}


def _bert_config(model: Retriever | MaskedReader | SpanReader) -> dict:
  """As transformers' config.json has it."""
  sizes = model.get_config()["architecture"]
  return {
      "vocab_size": sizes["vocabulary_size"], "hidden_size": sizes["hidden_dim"], "num_hidden_layers": sizes["num_layers"],
      "num_attention_heads": sizes["num_heads"], "intermediate_size": sizes["intermediate_dim"], "type_vocab_size": 2,
      "max_position_embeddings": sizes["max_sequence_length"], "hidden_dropout_prob": sizes["dropout"],
      "attention_probs_dropout_prob": sizes["dropout"], "hidden_act": published.hidden_act_of(sizes),
      "layer_norm_eps": encoder.layer_norm_epsilon(sizes)}


def config_of(*models: Retriever | MaskedReader | SpanReader) -> dict:
  """transformers' config.json for these models together."""
  config = {"model_type": "realm", "torch_dtype": "float32"}
  for model in models:
    config |= _bert_config(model)
    if isinstance(model, Retriever):
      config |= {"retriever_proj_size": model.dim}
    elif isinstance(model, SpanReader):
      told = model.get_config()
      config |= {"span_hidden_size": told["span_dim"], "max_span_width": told["max_span"], "reader_seq_len": told["length"],
                 "reader_layer_norm_eps": told["norm_epsilon"]}
  return config


def read_index(folder: str) -> Tensor:
  """All embeddings of an index as one tensor [N, D], read a file at a time."""
  artifacts.read_info(folder, kind=index.KIND)
  paths = index.shard_paths(folder)
  shapes = [index.shard_shape(path) for path in paths]
  starts = np.cumsum([0, *(num_rows for num_rows, _ in shapes)])

  def rows(start: int, stop: int) -> np.ndarray:
    parts = [index.read_shard(path)[max(start - first, 0):stop - first] for path, first, last in zip(paths, starts, starts[1:])
             if first < stop and start < last]
    return np.concatenate(parts)

  return Tensor((int(starts[-1]), shapes[0][1]), folder, rows)


def write_folder(folder: str, architecture: str, tensors: Tensors, config: Mapping, tokenizer: Tokenizer, *,
                 pad_row: int) -> None:
  """Writes config.json, model.safetensors and the tokenizer's files."""
  rules = tokenizer.rules
  texts = {"config.json": json.dumps({"architectures": [architecture], **config}, indent=2) + "\n",
           "tokenizer_config.json": json.dumps({
               "do_lower_case": rules.lower_case, "strip_accents": rules.strip_accents, "tokenize_chinese_chars": rules.split_cjk,
               "clean_text": rules.clean_text, "tokenizer_class": "RealmTokenizer"}) + "\n"}
  for name, text in texts.items():
    artifacts.write_text(os.path.join(folder, name), text)
  pieces = list(tokenizer.pieces)
  pieces[0], pieces[pad_row] = pieces[pad_row], pieces[0]
  vocabularies.write(folder, pieces)
  checkpoints.write_safetensors(os.path.join(folder, "model.safetensors"), tensors)


def write_block_records(folder: str, texts: Sequence[str]) -> None:
  """Writes block_records.npy, the text of the embedded passages as transformers pickles it."""
  records = np.empty(len(texts), object)
  records[:] = [text.encode() for text in texts]
  with artifacts.gfile.GFile(os.path.join(folder, "block_records.npy"), "wb") as file:
    np.save(file, records, allow_pickle=True)


def main(argv: Sequence[str]) -> None:
  del argv
  export(flags.FLAGS.workdir, flags.FLAGS.output)


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "Of a trainer, or of realm_tf.import_checkpoint.", required=True)
  flags.DEFINE_enum("format", "huggingface", ["huggingface"], "Whose format.")
  flags.DEFINE_string("output", None, "The folder to write folders into.", required=True)
  settings.start(main)

"""Exports a trained retriever and the encoder of its reader as a TensorFlow Hub module.

    python -m serving.export_hub --workdir=W --output=H

W is a workdir of realm_tf.pretrain, realm_tf.finetune or realm_tf.pretrain_ict; its newest snapshot
is exported. The module is a reusable SavedModel. The graph contains the vocabulary and the packing:
using the module needs TensorFlow Text's ops (`import tensorflow_text`), but nothing from this
repository.

    # query embeddings [B, D]
    hub.KerasLayer(H, trainable=True)(tf.constant(["who wrote hamlet"]))
    module = hub.load(H)
    # the same
    module.queries(["who wrote hamlet"])
    # passage embeddings [B, D]
    module.passages({"title": ["Hamlet"], "text": ["A play by Shakespeare."]})
    packed = module.pack_reader({"query": ["who wrote hamlet"], "text": ["A play by Shakespeare."]})
    # sequence_output [B, L, H], pooled_output [B, H]
    module.encoder(packed)
    # each part is a separate layer
    hub.KerasLayer(module.encoder, trainable=True)
    # in Keras 3 (*)
    keras.layers.TFSMLayer(H, call_endpoint="queries")

`queries` and `passages` take strings; `query_ids`, `passage_ids` and `encoder` take packed word
pieces (int32, zero-padded, of any length up to the encoder's), which `pack_queries`,
`pack_passages` and `pack_reader` produce. Each is also a signature with the same input names;
`serving_default` is `queries`.

(*) Keras 3.15 cannot name Adam's slots for the weights of a loaded SavedModel inside `fit`: call
`model.optimizer.build(model.trainable_variables)` first.
"""

from collections.abc import Callable, Mapping

from absl import flags

from realm_tf import cli

if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "A trainer's workdir.", required=True)
  flags.DEFINE_string("output", None, "The folder to write.", required=True)
  cli.start("serving.export_hub")

import keras
import tensorflow as tf
from absl import logging

from realm_tf.corpus.tokenization import Tokenizer
from realm_tf.examples import packing
from realm_tf.models import encoder, snapshots
from realm_tf.models.masked_reader import MaskedReader
from realm_tf.models.retriever import Retriever
from realm_tf.models.span_reader import SpanReader
from realm_tf.storage import artifacts, ownership, publishing, saved_models

KIND = "hub_module"

_TEXTS, _IDS = tf.TensorSpec([None], tf.string), tf.TensorSpec([None, None], tf.int32)
_SPECS = {"query": _TEXTS, "title": _TEXTS, "text": _TEXTS, "token_ids": _IDS, "segment_ids": _IDS}
_INPUTS = {  # of each part; a single input is passed by itself, two as a dict
  "queries": ["query"],
  "passages": ["title", "text"],
  "query_ids": ["token_ids"],
  "passage_ids": ["token_ids", "segment_ids"],
  "encoder": ["token_ids", "segment_ids"],
  "pack_queries": ["query"],
  "pack_passages": ["title", "text"],
  "pack_reader": ["query", "text"],
}


class Part(tf.train.Checkpoint):
  """A function and the variables that it reads, as wrapped by `KerasLayer` and `TFSMLayer`.

  Args:
    function: (inputs, training) → a tensor or a dict of tensors.
    model: the model whose variables the function reads, or None.
    inputs: names of the inputs.
  """

  def __init__(self, function: Callable, model: keras.Model | None, inputs: list[str]):
    super().__init__()

    @tf.function(autograph=False)
    def call(inputs, training=False):
      return function(inputs, training)

    specs = {name: _SPECS[name] for name in inputs}
    for training in (False, True):
      call.get_concrete_function(specs if len(specs) > 1 else specs[inputs[0]], training=training)
    # A SavedModel stores TensorFlow variables; those of Keras 3 only wrap them.
    self.variables = [variable.value for variable in model.variables] if model else []
    self.trainable_variables = (
      [variable.value for variable in model.trainable_variables] if model else []
    )
    self.regularization_losses: list[tf.Tensor] = []
    self.__call__ = call


def hub_module(
  retriever: Retriever, reader: MaskedReader | SpanReader | None, *, tokenizer: Tokenizer
) -> tuple[Part, dict]:
  """Builds the module to save.

  Args:
    retriever: the retriever; both of its towers are exported.
    reader: the reader whose encoder is exported; None if there is none (ICT).
    tokenizer: the tokenizer of both.

  Returns:
    The part that embeds queries, which has all parts as attributes, and the signatures.
  """
  functions = _functions(retriever, reader, tokenizer)
  models = {
    "queries": retriever.query_tower,
    "query_ids": retriever.query_tower,
    "passages": retriever.passage_tower,
    "passage_ids": retriever.passage_tower,
  }
  if reader is not None:
    # REALM's readers do not use it, but a downstream model may.
    reader.encoder.pooled_dense.trainable = True
    models["encoder"] = reader.encoder
  module = Part(functions["queries"], models["queries"], _INPUTS["queries"])
  for name, function in functions.items():
    setattr(module, name, Part(function, models.get(name), _INPUTS[name]))
  module.vocab_file = tf.saved_model.Asset(tokenizer.path)  # the name in TF Hub's BERT modules
  signatures = {name: _signature(function, _INPUTS[name]) for name, function in functions.items()}
  return module, {"serving_default": signatures["queries"], **signatures}


def _functions(
  retriever: Retriever, reader: MaskedReader | SpanReader | None, tokenizer: Tokenizer
) -> dict[str, Callable]:
  """Returns the function (inputs, training) → tensors of every part, by name."""

  def pack_queries(query, training=False):
    return packing.pack_queries(
      tokenizer(query), tokenizer=tokenizer, length=retriever.query_length
    )

  def pack_passages(passage, training=False):
    title_ids, text_ids = tokenizer(passage["title"]), tokenizer(passage["text"])
    return packing.pack_passages(
      title_ids,
      text_ids,
      tokenizer=tokenizer,
      length=retriever.passage_length,
      title_length=retriever.title_length,
    )._asdict()

  def pack_reader(pair, training=False):
    return packing.pack_reader(
      tokenizer(pair["query"]),
      tokenizer(pair["text"]),
      tokenizer=tokenizer,
      query_length=reader.query_length,
      length=reader.length,
    )._asdict()

  def query_ids(token_ids, training=False):
    return retriever.embed_queries(token_ids, training=training)

  def passage_ids(packed, training=False):
    return retriever.embed_passages(packed["token_ids"], packed["segment_ids"], training=training)

  def encode(packed, training=False):
    return encoder.encode(
      reader.encoder, packed["token_ids"], packed["segment_ids"], training=training
    )

  functions = {
    "queries": lambda query, training=False: query_ids(pack_queries(query), training),
    "passages": lambda passage, training=False: passage_ids(pack_passages(passage), training),
    "query_ids": query_ids,
    "passage_ids": passage_ids,
    "pack_queries": pack_queries,
    "pack_passages": pack_passages,
  }
  return (
    functions if reader is None else functions | {"encoder": encode, "pack_reader": pack_reader}
  )


def _signature(function: Callable, inputs: list[str]):
  """Wraps a part as a signature, with named inputs and a dict as its output."""

  @tf.function(autograph=False)
  def serve(**values):
    result = function(values if len(inputs) > 1 else values[inputs[0]])
    if isinstance(result, Mapping):
      return result
    return {"token_ids" if result.dtype == tf.int32 else "embedding": result}

  return serve.get_concrete_function(**{name: _SPECS[name] for name in inputs})


def export_hub(workdir: str, output: str) -> dict:
  """Publishes the module of the newest snapshot in a workdir; returns its info.json.

  Raises:
    ArtifactError: there is no snapshot, or it has no retriever.
  """
  snapshot = snapshots.newest(workdir, advice="give the workdir of a trainer that has finished.")
  ownership.check_output(output, kind=KIND, reads=[snapshot])
  info = artifacts.read_info(snapshot)
  retriever, tokenizer = snapshots.load_retriever(snapshot), snapshots.load_tokenizer(snapshot)
  reader = snapshots.load_model(snapshot, "reader") if "reader" in info["config"] else None
  module, signatures = hub_module(retriever, reader, tokenizer=tokenizer)
  with publishing.publish(
    output, kind=KIND, config=info["config"], inputs={"snapshot": snapshot}
  ) as staged:
    saved_models.save(module, staged.path, signatures=signatures)
    staged.details = {
      "signatures": {name: _INPUTS[name] for name in signatures if name in _INPUTS}
    } | {name: info[name] for name in ("step", "made_by", "vocab_fingerprint", "tokenizer")}
  return artifacts.read_info(output)


def main(argv):
  del argv
  logging.set_verbosity(logging.WARNING)  # TensorFlow logs every step of saving
  info = export_hub(flags.FLAGS.workdir, flags.FLAGS.output)
  print(
    f"{flags.FLAGS.output}: {', '.join(info['signatures'])}; step {info['step']} of "
    f"{info['made_by']}"
  )

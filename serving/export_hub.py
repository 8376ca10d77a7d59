"""Writes a trained retriever and its reader's encoder as one TensorFlow Hub module (a reusable SavedModel).

    python -m serving.export_hub --workdir=W --output=H

W is the workdir of realm_tf.pretrain, realm_tf.finetune or realm_tf.pretrain_ict; its newest snapshot is taken. Vocabulary and
packing are in the graph: what is exported needs TensorFlow Text's ops (`import tensorflow_text`) and nothing of this repository.

    hub.KerasLayer(H, trainable=True)(tf.constant(["who wrote hamlet"]))          # query embeddings [B, D]
    module = hub.load(H)
    module.queries(["who wrote hamlet"])                                          # the same
    module.passages({"title": ["Hamlet"], "text": ["A play by Shakespeare."]})    # passage embeddings [B, D]
    packed = module.pack_reader({"query": ["who wrote hamlet"], "text": ["A play by Shakespeare."]})
    module.encoder(packed)                                                        # sequence_output [B, L, H], pooled_output [B, H]
    hub.KerasLayer(module.encoder, trainable=True)                                # each part is a layer of its own
    keras.layers.TFSMLayer(H, call_endpoint="queries")                            # in Keras 3 (*)

`queries` and `passages` take strings; `query_ids`, `passage_ids` and `encoder` take packed word pieces (int32, zero padded, of any
length up to the encoder's), which `pack_queries`, `pack_passages` and `pack_reader` make. Each is also a signature, with the same
names of inputs; `serving_default` is `queries`.

(*) Keras 3.15 cannot name Adam's slots for a loaded SavedModel's weights inside `fit`: call
`model.optimizer.build(model.trainable_variables)` before it.
"""

from collections.abc import Callable, Mapping

import keras
import tensorflow as tf
from absl import flags, logging

from realm_tf import artifacts, examples, ownership, settings, snapshots
from realm_tf.models import encoder
from realm_tf.models.masked_reader import MaskedReader
from realm_tf.models.retriever import Retriever
from realm_tf.models.span_reader import SpanReader
from realm_tf.tokenization import Tokenizer

KIND = "hub_module"

_TEXTS, _IDS = tf.TensorSpec([None], tf.string), tf.TensorSpec([None, None], tf.int32)
_SPECS = {"query": _TEXTS, "title": _TEXTS, "text": _TEXTS, "token_ids": _IDS, "segment_ids": _IDS}
_INPUTS = {  # of each part; one input is given as it is, two as a dict
    "queries": ["query"], "passages": ["title", "text"], "query_ids": ["token_ids"], "passage_ids": ["token_ids", "segment_ids"],
    "encoder": ["token_ids", "segment_ids"], "pack_queries": ["query"], "pack_passages": ["title", "text"],
    "pack_reader": ["query", "text"]}


class Part(tf.train.Checkpoint):
  """A function with the variables that it reads: what `hub.KerasLayer` and `keras.layers.TFSMLayer` wrap.

  Args:
    function: (inputs, training) → a tensor or a dict of tensors.
    model: whose variables the function reads, or None.
    inputs: names of the inputs.
  """

  def __init__(self, function: Callable, model: keras.Model | None, inputs: list[str]):
    super().__init__()

    @tf.function
    def call(inputs, training=False):
      return function(inputs, training)

    specs = {name: _SPECS[name] for name in inputs}
    for training in (False, True):
      call.get_concrete_function(specs if len(specs) > 1 else specs[inputs[0]], training=training)
    # A SavedModel keeps TensorFlow's variables, which Keras 3's only hold.
    self.variables = [variable.value for variable in model.variables] if model else []
    self.trainable_variables = [variable.value for variable in model.trainable_variables] if model else []
    self.regularization_losses = []
    self.__call__ = call


def hub_module(retriever: Retriever, reader: MaskedReader | SpanReader | None, *, tokenizer: Tokenizer) -> tuple[Part, dict]:
  """What is saved: the part that embeds queries, with all parts as its attributes, and the signatures.

  Args:
    retriever: both towers.
    reader: whose encoder is exported; None where there is none (ICT).
  """
  functions = _functions(retriever, reader, tokenizer)
  models = {"queries": retriever.query_tower, "query_ids": retriever.query_tower, "passages": retriever.passage_tower,
            "passage_ids": retriever.passage_tower}
  if reader is not None:
    reader.encoder.pooled_dense.trainable = True  # REALM's readers do not read it; a model downstream may
    models["encoder"] = reader.encoder
  module = Part(functions["queries"], models["queries"], _INPUTS["queries"])
  for name, function in functions.items():
    setattr(module, name, Part(function, models.get(name), _INPUTS[name]))
  module.vocab_file = tf.saved_model.Asset(tokenizer.path)  # as TF Hub's BERT modules name it
  signatures = {name: _signature(function, _INPUTS[name]) for name, function in functions.items()}
  return module, {"serving_default": signatures["queries"], **signatures}


def _functions(retriever: Retriever, reader: MaskedReader | SpanReader | None, tokenizer: Tokenizer) -> dict[str, Callable]:
  """Name → (inputs, training) → tensors, of every part."""

  def pack_queries(query, training=False):
    return examples.pack_queries(tokenizer(query), tokenizer=tokenizer, length=retriever.query_length)

  def pack_passages(passage, training=False):
    title_ids, text_ids = tokenizer(passage["title"]), tokenizer(passage["text"])
    return examples.pack_passages(title_ids, text_ids, tokenizer=tokenizer, length=retriever.passage_length,
                                  title_length=retriever.title_length)._asdict()

  def pack_reader(pair, training=False):
    return examples.pack_reader(tokenizer(pair["query"]), tokenizer(pair["text"]), tokenizer=tokenizer,
                                query_length=reader.query_length, length=reader.length)._asdict()

  def query_ids(token_ids, training=False):
    return retriever.embed_queries(token_ids, training=training)

  def passage_ids(packed, training=False):
    return retriever.embed_passages(packed["token_ids"], packed["segment_ids"], training=training)

  def encode(packed, training=False):
    return encoder.encode(reader.encoder, packed["token_ids"], packed["segment_ids"], training=training)

  functions = {
      "queries": lambda query, training=False: query_ids(pack_queries(query), training),
      "passages": lambda passage, training=False: passage_ids(pack_passages(passage), training),
      "query_ids": query_ids, "passage_ids": passage_ids, "pack_queries": pack_queries, "pack_passages": pack_passages}
  return functions if reader is None else functions | {"encoder": encode, "pack_reader": pack_reader}


def _signature(function: Callable, inputs: list[str]):
  """A part with its inputs by name and a dict as its output, as signatures must be."""

  @tf.function
  def serve(**values):
    result = function(values if len(inputs) > 1 else values[inputs[0]])
    if isinstance(result, Mapping):
      return result
    return {"token_ids" if result.dtype == tf.int32 else "embedding": result}

  return serve.get_concrete_function(**{name: _SPECS[name] for name in inputs})


def export_hub(workdir: str, output: str) -> dict:
  """Publishes the module of a workdir's newest snapshot; returns its info.json.

  Raises:
    ArtifactError: no snapshot is there, or it has no retriever.
  """
  snapshot = snapshots.newest(workdir, advice="give the workdir of a trainer that has finished.")
  ownership.check_output(output, kind=KIND, reads=[snapshot])
  info = artifacts.read_info(snapshot)
  retriever, tokenizer = snapshots.load_retriever(snapshot), snapshots.load_tokenizer(snapshot)
  reader = snapshots.load_model(snapshot, "reader") if "reader" in info["config"] else None
  module, signatures = hub_module(retriever, reader, tokenizer=tokenizer)
  with artifacts.publish(output, kind=KIND, config=info["config"], inputs={"snapshot": snapshot}) as staged:
    tf.saved_model.save(module, staged.path, signatures=signatures)
    staged.details = {"signatures": {name: _INPUTS[name] for name in signatures if name in _INPUTS}} | {
        name: info[name] for name in ("step", "made_by", "vocab_fingerprint", "tokenizer")}
  return artifacts.read_info(output)


def main(argv):
  del argv
  logging.set_verbosity(logging.WARNING)  # TensorFlow tells every step of saving
  info = export_hub(flags.FLAGS.workdir, flags.FLAGS.output)
  print(f"{flags.FLAGS.output}: {', '.join(info['signatures'])}; step {info['step']} of {info['made_by']}")


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "A trainer's workdir.", required=True)
  flags.DEFINE_string("output", None, "The folder to write.", required=True)
  settings.start(main)

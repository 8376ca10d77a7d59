"""The TF Hub module computes what its models compute, and can be trained downstream.

It is used through hub.load, hub.KerasLayer and TFSMLayer.
"""

import dataclasses
import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_hub as hub

from realm_tf.corpus import tokenization
from realm_tf.examples import packing
from realm_tf.models import encoder, snapshots
from realm_tf.models.masked_reader import MaskedReader
from realm_tf.models.retriever import Retriever
from realm_tf.models.span_reader import SpanReader
from realm_tf.storage import artifacts
from serving import export_hub
from tests.processes import REPOSITORY

WHO = [
  "who wrote Hamlet?",
  "who sails to Ømberg",
  "who is the oldest of them?",
  "who told it to Rön?",
]
WHEN = [
  "when was Hamlet written?",
  "when do they sail",
  "in which year was it",
  "since when is Ömberg a town?",
]
QUERIES = [*WHO, *WHEN, "", "a query that goes on and on " * 10]
TITLES = ["Hamlet", "Ömberg", "", "A title that is too long " * 10] * 2
TEXTS = [
  "Hamlet is a play by William Shakespeare.",
  "Rön lives there – in Ömberg.",
  "",
  "and on and on and on " * 20,
] * 2


@dataclasses.dataclass
class Exported:
  """A workdir's models and the module made from them."""

  retriever: Retriever
  reader: MaskedReader | SpanReader | None
  tokenizer: tokenization.Tokenizer
  folder: str
  module: object  # hub.load(folder)


@pytest.fixture(scope="module", params=["pretrain", "finetune", "pretrain_ict"])
def exported(request, tmp_path_factory) -> Exported:
  """Workdirs of each trainer, with dropout and with weights that no two layers share."""
  root = tmp_path_factory.mktemp(request.param)
  vocab = str(root / "vocab.txt")
  artifacts.write_text(
    vocab, "\n".join(tokenization.train_vocabulary(QUERIES + TEXTS, size=200, min_count=1)) + "\n"
  )
  tokenizer = tokenization.Tokenizer(vocab)
  keras.utils.set_random_seed(1)
  sizes = dict(
    num_layers=1,
    num_heads=2,
    hidden_dim=16,
    intermediate_dim=32,
    max_sequence_length=48,
    dropout=0.1,
    vocabulary_size=tokenizer.size,
  )
  fine_tuned = request.param == "finetune"
  retriever = Retriever(
    architecture=sizes,
    projection_dim=8,
    query_length=16,
    passage_length=24,
    dropout=0.1,
    shared=not fine_tuned,
    pooling="mean" if fine_tuned else "cls",
  )
  readers = {"pretrain": MaskedReader, "finetune": SpanReader}
  reader = (
    readers[request.param](architecture=sizes, query_length=16, length=40)
    if request.param in readers
    else None
  )
  for tower in retriever.towers:
    encoder.rescale_fresh(tower.encoder, 0.3)
  if reader:
    encoder.rescale_fresh(reader.encoder, 0.3)
  models = {"retriever": retriever} | ({"reader": reader} if reader else {})
  snapshots.publish(str(root / "snapshots"), 7, models, tokenizer=tokenizer, made_by=request.param)
  info = export_hub.export_hub(str(root), str(root / "hub"))
  assert (info["kind"], info["step"], info["made_by"]) == ("hub_module", 7, request.param)
  return Exported(retriever, reader, tokenizer, str(root / "hub"), hub.load(str(root / "hub")))


pretrained_only = pytest.mark.parametrize("exported", ["pretrain"], indirect=True)


def close(got, wanted, what: str) -> None:
  got, wanted = np.asarray(got), np.asarray(wanted)
  np.testing.assert_allclose(got, wanted, atol=1e-5, err_msg=what)


def wanted_values(exported: Exported) -> dict:
  """Returns the outputs of realm_tf's own code."""
  tokenizer, retriever, reader = exported.tokenizer, exported.retriever, exported.reader
  tokens = {
    name: tokenizer(tf.constant(texts))
    for name, texts in (("query", QUERIES), ("title", TITLES), ("text", TEXTS))
  }
  query_ids = packing.pack_queries(
    tokens["query"], tokenizer=tokenizer, length=retriever.query_length
  )
  passage = packing.pack_passages(
    tokens["title"], tokens["text"], tokenizer=tokenizer, length=retriever.passage_length
  )
  values = {
    "pack_queries": query_ids,
    "pack_passages": passage._asdict(),
    "queries": retriever.embed_queries(query_ids),
    "passages": retriever.embed_passages(*passage),
  }
  if reader:
    packed = packing.pack_reader(
      tokens["query"][: len(TEXTS)],
      tokens["text"],
      tokenizer=tokenizer,
      query_length=reader.query_length,
      length=reader.length,
    )
    values |= {"pack_reader": packed._asdict(), "encoder": encoder.encode(reader.encoder, *packed)}
  return values


# ------------------------------------------------------------------------------------------ loading


def test_loaded_values_are_the_models_own(exported):
  module, wanted = exported.module, wanted_values(exported)
  inputs = {
    "queries": QUERIES,
    "passages": {"title": TITLES, "text": TEXTS},
    "pack_queries": QUERIES,
    "pack_passages": {"title": TITLES, "text": TEXTS},
    "query_ids": wanted["pack_queries"],
    "passage_ids": wanted["pack_passages"],
  }
  wanted |= {"query_ids": wanted["queries"], "passage_ids": wanted["passages"]}
  if exported.reader:
    inputs |= {
      "pack_reader": {"query": QUERIES[: len(TEXTS)], "text": TEXTS},
      "encoder": wanted["pack_reader"],
    }
  assert set(module.signatures) == {*inputs, "serving_default"}
  for name, given in inputs.items():
    got = getattr(module, name)(
      tf.nest.map_structure(tf.constant, given) if isinstance(given, dict) else tf.constant(given)
    )
    by_name = given if isinstance(given, dict) else {export_hub._INPUTS[name][0]: given}
    signed = module.signatures[name](**{key: tf.constant(value) for key, value in by_name.items()})
    if isinstance(wanted[name], dict):
      assert set(got) == set(signed) == set(wanted[name])
      for key in got:
        close(got[key], wanted[name][key], f"{name}.{key}")
        close(signed[key], wanted[name][key], f"signature {name}.{key}")
    else:
      close(got, wanted[name], name)
      (output,) = signed.values()
      close(output, wanted[name], f"signature {name}")
  close(module(QUERIES), wanted["queries"], "module")
  close(
    module.signatures["serving_default"](query=tf.constant(QUERIES))["embedding"],
    wanted["queries"],
    "serving_default",
  )
  assert np.ptp(np.asarray(wanted["queries"]), axis=0).max() > 0.1, (
    "all embeddings are alike, so nothing was compared"
  )
  with open(module.vocab_file.asset_path.numpy()) as file:
    assert file.read().split() == list(exported.tokenizer.pieces)


@pretrained_only
def test_packed_inputs_may_be_shorter(exported):
  """Padding is masked out: with half the padding, the embedding is the same."""
  module = exported.module
  ids = module.pack_queries(WHO)
  close(module.query_ids(ids[:, :14]), module.queries(WHO), "queries of 14 word pieces")


@pretrained_only
def test_gradients_are_the_models_own(exported):
  """Through hub.load, a loss reaches every trainable weight.

  The gradient is that of the live model.
  """
  module, live = exported.module, exported.retriever.query_tower
  ids = wanted_values(exported)["pack_queries"]
  with tf.GradientTape() as tape:
    got_loss = tf.reduce_sum(module.queries(QUERIES) ** 2 * tf.range(8.0))
  got = tape.gradient(got_loss, list(module.trainable_variables))
  with tf.GradientTape() as tape:
    loss = tf.reduce_sum(live(ids) ** 2 * tf.range(8.0))
  wanted = tape.gradient(loss, [variable.value for variable in live.trainable_variables])
  assert len(got) == len(wanted) > 10 and all(gradient is not None for gradient in got)
  for variable, a, b in zip(live.trainable_variables, got, wanted, strict=True):
    np.testing.assert_allclose(
      tf.convert_to_tensor(a), tf.convert_to_tensor(b), rtol=1e-4, atol=1e-4, err_msg=variable.path
    )


@pretrained_only
def test_dropout_is_on_in_training_only(exported):
  module = exported.module
  close(module.queries(WHO, training=False), module.queries(WHO), "training=False is the default")
  first, second = module.queries(WHO, training=True), module.queries(WHO, training=True)
  assert np.abs(first - second).max() > 0.01


# --------------------------------------------------------------------------------------- downstream


@pretrained_only
def test_tfsm_layer_trains_in_keras_3(exported):
  keras.utils.set_random_seed(2)
  layer, wanted = (
    keras.layers.TFSMLayer(exported.folder, call_endpoint="queries"),
    wanted_values(exported),
  )
  close(layer(tf.constant(QUERIES)), wanted["queries"], "TFSMLayer queries")
  by_signature = keras.layers.TFSMLayer(exported.folder, call_endpoint="serving_default")
  close(
    by_signature(tf.constant(QUERIES))["embedding"], wanted["queries"], "TFSMLayer serving_default"
  )
  passage_layer = keras.layers.TFSMLayer(exported.folder, call_endpoint="passages")
  close(
    passage_layer({"title": tf.constant(TITLES), "text": tf.constant(TEXTS)}),
    wanted["passages"],
    "TFSMLayer passages",
  )

  inputs = keras.Input([], dtype="string")
  model = keras.Model(inputs, keras.layers.Dense(1)(layer(inputs)))
  model.compile(keras.optimizers.Adam(1e-2), keras.losses.BinaryCrossentropy(from_logits=True))
  model.optimizer.build(model.trainable_variables)  # see export_hub's docstring
  before = layer.get_weights()
  texts, labels = tf.constant(WHO + WHEN), tf.constant([[0.0]] * len(WHO) + [[1.0]] * len(WHEN))
  losses = model.fit(texts, labels, batch_size=len(labels), epochs=25, verbose=0).history["loss"]
  moved = sum(
    np.abs(after - was).max() > 1e-4 for after, was in zip(layer.get_weights(), before, strict=True)
  )
  assert losses[-1] < losses[0] / 2
  # a key's bias does nothing in a softmax
  assert moved >= len(exported.retriever.query_tower.trainable_variables) - 1


_DOWNSTREAM = """
import json, sys
import numpy as np, tensorflow as tf, tensorflow_hub as hub, tensorflow_text, tf_keras

folder, spec = sys.argv[1], json.load(sys.stdin)
texts, labels = tf.constant(spec["texts"]), tf.constant(spec["labels"])
tf_keras.utils.set_random_seed(3)
layer = hub.KerasLayer(folder, trainable=True, input_shape=[], dtype=tf.string)
start = layer(texts).numpy()
weights = [weight.numpy() for weight in layer.trainable_weights]
model = tf_keras.Sequential([layer, tf_keras.layers.Dense(1)])
model.compile(tf_keras.optimizers.Adam(1e-2), tf_keras.losses.BinaryCrossentropy(from_logits=True))
losses = model.fit(texts, labels, batch_size=len(labels), epochs=25, verbose=0).history["loss"]
moved = [
  float(np.abs(new.numpy() - old).max()) for new, old in zip(layer.trainable_weights, weights)
]
model.save(sys.argv[2])
again = tf_keras.models.load_model(sys.argv[2]).predict(texts, verbose=0)
result = dict(
  start=start.tolist(),
  losses=losses,
  moved=moved,
  saved=float(np.abs(again - model.predict(texts, verbose=0)).max()),
  frozen=len(hub.KerasLayer(folder).trainable_weights),
  repository="realm_tf" in sys.modules,
)

module = hub.load(folder)
if hasattr(module, "encoder"):
  # A reader on top of strings: is the text about the query?
  # Training continues from the encoder's [CLS] vector.
  inputs = {name: tf_keras.Input([], dtype=tf.string, name=name) for name in ("query", "text")}
  reader = hub.KerasLayer(module.encoder, trainable=True)
  outputs = reader(hub.KerasLayer(module.pack_reader)(inputs))
  head = tf_keras.Model(inputs, tf_keras.layers.Dense(1)(outputs["pooled_output"]))
  head.compile(tf_keras.optimizers.Adam(1e-2), tf_keras.losses.BinaryCrossentropy(from_logits=True))
  weights = [weight.numpy() for weight in reader.trainable_weights]
  pairs = {"query": texts, "text": tf.constant(["Who knows."] * len(labels))}
  fitted = head.fit(pairs, labels, batch_size=len(labels), epochs=25, verbose=0)
  result["reader_losses"] = fitted.history["loss"]
  result["reader_moved"] = [
    float(np.abs(new.numpy() - old).max()) for new, old in zip(reader.trainable_weights, weights)
  ]
print(json.dumps(result))
"""


@pretrained_only
def test_hub_keras_layer_trains_without_this_repository(exported, tmp_path):
  """hub.KerasLayer is for Keras 2, in a separate process.

  That process uses only TensorFlow Text, TF Hub and the folder.
  """
  spec = {"texts": WHO + WHEN, "labels": [[0.0]] * len(WHO) + [[1.0]] * len(WHEN)}
  environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
    "TF_USE_LEGACY_KERAS": "1"
  }
  done = subprocess.run(
    [sys.executable, "-c", _DOWNSTREAM, exported.folder, str(tmp_path / "classifier")],
    input=json.dumps(spec),
    cwd=tmp_path,
    env=environment,
    capture_output=True,
    text=True,
    timeout=240,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  got = json.loads(done.stdout.splitlines()[-1])
  assert not got["repository"]
  close(got["start"], wanted_values(exported)["queries"][: len(spec["texts"])], "hub.KerasLayer")
  assert got["losses"][-1] < got["losses"][0] / 2 and got["frozen"] == 0 and got["saved"] < 1e-5
  assert len(got["moved"]) == len(exported.retriever.query_tower.trainable_variables)
  # a key's bias does nothing in a softmax
  assert sum(moved > 1e-4 for moved in got["moved"]) >= len(got["moved"]) - 1
  if exported.reader:
    assert got["reader_losses"][-1] < got["reader_losses"][0] / 2
    assert sum(moved > 1e-4 for moved in got["reader_moved"]) >= len(got["reader_moved"]) - 1


# ----------------------------------------------------------------------------------------- mistakes


def test_a_mistake_is_told_and_leaves_nothing(tmp_path):
  """Workdirs without a snapshot, and without a retriever (masked-LM warm start, closed book)."""
  vocab = tmp_path / "vocab.txt"
  vocab.write_text("\n".join([*tokenization.SPECIAL, "a"]) + "\n")
  tokenizer = tokenization.Tokenizer(str(vocab))
  sizes = dict(
    num_layers=1,
    num_heads=1,
    hidden_dim=4,
    intermediate_dim=4,
    max_sequence_length=8,
    dropout=0.0,
    vocabulary_size=tokenizer.size,
  )
  reader = MaskedReader(architecture=sizes, query_length=4, length=8)
  snapshots.publish(
    str(tmp_path / "mlm/snapshots"),
    1,
    {"reader": reader},
    tokenizer=tokenizer,
    made_by="pretrain_mlm",
  )
  for workdir, said in (("nothing", "no snapshot in"), ("mlm", "holds reader; wanted retriever")):
    with pytest.raises(artifacts.ArtifactError, match=said):
      export_hub.export_hub(str(tmp_path / workdir), str(tmp_path / "out/hub"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("exported", ["pretrain_ict"], indirect=True)
def test_the_command(exported):
  """Runs the command as users do; the earlier module in the same place is replaced."""
  root, before = (
    os.path.dirname(exported.folder),
    os.stat(os.path.join(exported.folder, "saved_model.pb")),
  )
  done = subprocess.run(
    [
      sys.executable,
      "-m",
      "serving.export_hub",
      f"--workdir={root}",
      f"--output={exported.folder}",
    ],
    cwd=REPOSITORY,
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 0 and done.stdout.strip().endswith("step 7 of pretrain_ict"), (
    done.stderr
  )
  assert os.stat(os.path.join(exported.folder, "saved_model.pb")).st_ino != before.st_ino
  assert sorted(os.listdir(root)) == ["hub", "snapshots", "vocab.txt"]

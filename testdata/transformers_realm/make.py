"""Writes the fixtures of this folder.

They are tiny random REALM checkpoints by transformers' own classes, and what these compute.

    python -m venv T && T/bin/pip install transformers==4.39.3 torch 'numpy<2' safetensors
    # embedder/ .. openqa/, bert/, outputs.npz
    T/bin/python testdata/transformers_realm/make.py
    # what realm_tf.export_checkpoint wrote gives the same
    T/bin/python testdata/transformers_realm/make.py --check=DIR/NAME
    # minilm.npz: hidden states of that real BERT
    T/bin/python testdata/transformers_realm/make.py --minilm=FOLDER

Every weight is random, biases and gains too, so that no two could be mixed up unseen.
"""

import argparse
import json
import os

import numpy as np
import torch
import transformers
from transformers import (
  BertConfig,
  BertForPreTraining,
  BertModel,
  RealmConfig,
  RealmEmbedder,
  RealmForOpenQA,
  RealmKnowledgeAugEncoder,
  RealmReader,
  RealmRetriever,
  RealmScorer,
  RealmTokenizer,
)

HERE = os.path.dirname(os.path.abspath(__file__))
WORDS = (
  "the a of in is was who what where wrote found made city river king queen first last red blue "
  "old new north south tower bridge ada bo cy dee eve fay gus hal ivy jo kit lou"
).split()
LETTERS = [*"bcdefghijklmnopqrstuvwxyz", *(f"##{letter}" for letter in "aeiourst"), "."]
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *LETTERS]
BLOCKS = [
  "ada wrote the old book .",
  "the red bridge in the north was made in the city of bo .",
  "king gus found a new river .",
  "queen ivy was the first queen of the south .",
  "who made the blue tower is lou .",
  "jo was in the city .",
  "kit and dee .",
]
QUESTION = "who made the blue tower"
SIZES = dict(
  vocab_size=len(PIECES),
  hidden_size=16,
  num_hidden_layers=2,
  num_attention_heads=4,
  intermediate_size=24,
  max_position_embeddings=48,
  pad_token_id=0,
  layer_norm_eps=1e-3,  # far from the usual, so that it is seen
)
CONFIG = RealmConfig(
  **SIZES,
  reader_layer_norm_eps=1e-2,
  retriever_proj_size=8,
  num_candidates=3,
  span_hidden_size=6,
  max_span_width=4,
  reader_beam_size=3,
  reader_seq_len=40,
  num_block_records=len(BLOCKS),
  searcher_beam_size=5,
)


def randomize(model, seed: int):
  """Every parameter random, gains around 1."""
  generator = torch.Generator().manual_seed(seed)
  for name, parameter in model.named_parameters():
    is_gain = name.endswith(("LayerNorm.weight", "layer_normalization.weight"))
    parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator) + float(is_gain)
  return model.eval()


def inputs(num: int, length: int, seed: int) -> dict[str, torch.Tensor]:
  """Rows of `[CLS] a [SEP] b [SEP]` of different lengths, zero padded."""
  rng = np.random.default_rng(seed)
  ids, segments = np.zeros([2, num, length], np.int64)
  for row in range(num):
    size = rng.integers(8, length + 1)
    ids[row, :size] = rng.integers(5, len(PIECES), size)
    ids[row, [0, size // 2, size - 1]] = 2, 3, 3
    segments[row, size // 2 + 1 : size] = 1
  return {
    "input_ids": torch.tensor(ids),
    "token_type_ids": torch.tensor(segments),
    "attention_mask": torch.tensor(ids != 0).long(),
  }


def save(model, name: str, *, safe: bool) -> None:
  folder = os.path.join(HERE, name)
  model.save_pretrained(folder, safe_serialization=safe)
  with open(os.path.join(folder, "vocab.txt"), "w") as file:
    file.write("\n".join(PIECES) + "\n")
  with open(os.path.join(folder, "tokenizer_config.json"), "w") as file:
    json.dump({"do_lower_case": True, "tokenizer_class": "RealmTokenizer"}, file)


def run_embedder(model) -> dict:
  batch = inputs(4, 20, 1)
  return {
    "ids": batch["input_ids"],
    "segments": batch["token_type_ids"],
    "vectors": model(**batch).projected_score,
  }


def run_scorer(model) -> dict:
  queries, candidates = inputs(2, 12, 2), inputs(6, 20, 3)
  scores = model(
    **queries, **{f"candidate_{name}": value.view(2, 3, 20) for name, value in candidates.items()}
  )
  return {
    "query_ids": queries["input_ids"],
    "query_segments": queries["token_type_ids"],
    "ids": candidates["input_ids"],
    "segments": candidates["token_type_ids"],
    "scores": scores.relevance_score,
  }


def run_encoder(model) -> dict:
  batch = inputs(6, 24, 4)
  relevance, labels, mask = (
    torch.tensor([[1.0, 0.5, -1.0], [0.2, 0.1, 3.0]]),
    torch.full([2, 24], -100),
    torch.zeros([2, 24]),
  )
  positions = torch.tensor([[1, 3], [2, 4]])
  for row, at in enumerate(positions):
    labels[row, at], mask[row, at] = torch.tensor([7, 11]) + row, torch.ones(2)
  shaped = {name: value.view(2, 3, 24) for name, value in batch.items()}
  done = model(**shaped, relevance_score=relevance, labels=labels, mlm_mask=mask)
  logits = done.logits.view(2, 3, 24, -1)
  return {
    "ids": batch["input_ids"],
    "segments": batch["token_type_ids"],
    "relevance": relevance,
    "positions": positions,
    "targets": labels.gather(1, positions),
    "loss": done.loss,
    "logits": torch.stack([logits[row][:, at] for row, at in enumerate(positions)]),
  }


def run_reader(model) -> dict:
  batch, relevance = inputs(3, 28, 5), torch.tensor([0.3, -0.2, 0.1])
  ids, segments = batch["input_ids"], batch["token_type_ids"]
  block_mask = segments.bool() & (ids != 3)
  hidden = model.realm(**batch)[0]
  logits, starts, ends = model.qa_outputs(hidden, block_mask)
  done = model(**batch, relevance_score=relevance, block_mask=block_mask)
  return {
    "ids": ids,
    "segments": segments,
    "relevance": relevance,
    "logits": logits,
    "starts": starts,
    "ends": ends,
    "block": done.block_idx,
    "start": done.start_pos,
    "end": done.end_pos,
  }


def run_openqa(model) -> dict:
  tokenizer = RealmTokenizer(os.path.join(HERE, "openqa", "vocab.txt"))
  model.retriever = RealmRetriever(
    np.array([block.encode() for block in BLOCKS], dtype=object), tokenizer
  )
  question = tokenizer([QUESTION], return_tensors="pt")
  done = model(**question)
  vectors = model.embedder(**question).projected_score
  answer = tokenizer.decode(done.predicted_answer_ids, clean_up_tokenization_spaces=False)
  return {
    "question": QUESTION,
    "blocks": np.array(BLOCKS),
    "vector": vectors,
    "scores": vectors @ model.block_emb.T,
    "answer": answer,
    "block": done.reader_output.block_idx,
  }


def run_bert(model) -> dict:
  batch = inputs(3, 24, 6)
  logits = model(**batch).prediction_logits
  return {
    "ids": batch["input_ids"],
    "segments": batch["token_type_ids"],
    "logits": logits,
    "hidden": model.bert(**batch)[0],
  }


def scorer_with_two_towers() -> RealmScorer:
  return RealmScorer(CONFIG, query_embedder=RealmEmbedder(CONFIG))


def load_scorer(folder: str) -> RealmScorer:
  return RealmScorer.from_pretrained(folder, query_embedder=RealmEmbedder(CONFIG))


MODELS = {  # name -> (how it is made, how it is loaded from a folder, what it computes)
  "embedder": (lambda: RealmEmbedder(CONFIG), RealmEmbedder.from_pretrained, run_embedder),
  "scorer": (scorer_with_two_towers, load_scorer, run_scorer),
  "encoder": (
    lambda: RealmKnowledgeAugEncoder(CONFIG),
    RealmKnowledgeAugEncoder.from_pretrained,
    run_encoder,
  ),
  "reader": (lambda: RealmReader(CONFIG), RealmReader.from_pretrained, run_reader),
  "openqa": (lambda: RealmForOpenQA(CONFIG), RealmForOpenQA.from_pretrained, run_openqa),
}


def make() -> None:
  outputs = {}
  for seed, (name, (new, _, compute)) in enumerate(MODELS.items()):
    model = randomize(new(), seed)
    if name == "openqa":
      model.block_emb = torch.randn(
        model.block_emb.shape, generator=torch.Generator().manual_seed(9)
      )
    save(model, name, safe=name in ("embedder", "encoder"))
    outputs |= {f"{name}.{key}": np.asarray(value) for key, value in compute(model).items()}
  np.save(
    os.path.join(HERE, "openqa", "block_records.npy"),
    np.array([block.encode() for block in BLOCKS], dtype=object),
  )
  # hidden_act="gelu", by the error function.
  bert = randomize(BertForPreTraining(BertConfig(**SIZES)), 20)
  save(bert, "bert", safe=False)
  outputs |= {f"bert.{key}": np.asarray(value) for key, value in run_bert(bert).items()}
  np.savez_compressed(os.path.join(HERE, "outputs.npz"), **outputs)


def check(folder: str) -> None:
  """Compares what transformers computes with an exported folder and the fixture of its name."""
  wanted, name = np.load(os.path.join(HERE, "outputs.npz")), os.path.basename(folder)
  _, load, compute = MODELS[name]
  model, report = load(folder).eval(), {}
  # Of a batch, which a checkpoint does not tell.
  model.config.num_candidates = CONFIG.num_candidates
  for key, value in compute(model).items():
    got, want = np.asarray(value), wanted[f"{name}.{key}"]
    if want.dtype.kind == "f":
      report[key] = float(np.abs(got - want).max())
      assert report[key] == 0, (name, key, report[key])
    else:
      assert (got == want).all(), (name, key)
  print(f"{name}: {', '.join(report)} are the same to the last bit")


def minilm(folder: str) -> None:
  model, rng = BertModel.from_pretrained(folder).eval(), np.random.default_rng(0)
  ids, segments = rng.integers(1000, 20_000, [2, 12]), np.zeros([2, 12], int)
  ids[1, 7:], segments[0, 6:] = 0, 1
  hidden = model(
    torch.tensor(ids), attention_mask=torch.tensor(ids != 0), token_type_ids=torch.tensor(segments)
  ).last_hidden_state
  np.savez_compressed(
    os.path.join(HERE, "minilm.npz"), ids=ids, segments=segments, hidden=hidden.numpy()
  )


if __name__ == "__main__":
  parser = argparse.ArgumentParser()
  parser.add_argument("--check")
  parser.add_argument("--minilm")
  args = parser.parse_args()
  transformers.logging.set_verbosity_error()
  with torch.no_grad():
    if args.check:
      check(args.check)
    elif args.minilm:
      minilm(args.minilm)
    else:
      make()

"""REALM's step with the Realm classes of transformers, as its documentation uses them.

Rows keep the padding that `RealmTokenizer.batch_encode_candidates` gives them: it always pads to
the greatest length.
"""

import itertools
from collections.abc import Mapping

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from benchmarks.speed import jobs
from benchmarks.speed.jobs import Job
from benchmarks.speed.peer_torch import Optimizer, Weights, batches_of, weights_of


class RealmStep:
  """Steps of RealmScorer and RealmKnowledgeAugEncoder."""

  def __init__(self, job: Job):
    self.versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    weights, batches = weights_of(job), batches_of(job.inputs)
    config = config_of(job.architecture, weights, num_candidates=batches[0]["reader_ids"].shape[1])
    self._scorer = transformers.RealmScorer(config)
    self._scorer.query_embedder = self._scorer.embedder  # one tower for both, as published
    load(self._scorer.embedder, weights, "retriever.")
    self._encoder = transformers.RealmKnowledgeAugEncoder(config)
    load(self._encoder, weights, "reader.")
    self._optimizer = Optimizer(nn.ModuleList([self._scorer, self._encoder]), fused=False)
    self._batches = itertools.cycle([inputs_of(batch) for batch in batches])

  def write_outputs(self, path: str) -> None:
    np.save(path, [self._loss() for _ in range(jobs.CHECKED_STEPS)])

  def run(self, steps: int) -> float:
    return [self._loss() for _ in range(steps)][-1]

  def _loss(self) -> float:
    """Takes one step; returns its loss."""
    batch = next(self._batches)
    scores = self._scorer(**batch["scorer"]).relevance_score
    return self._optimizer.step(self._encoder(**batch["encoder"], relevance_score=scores).loss)


def config_of(
  sizes: Mapping, weights: Weights, *, num_candidates: int
) -> "transformers.RealmConfig":
  """Returns the configuration of both models, without dropout.

  "gelu_pytorch_tanh" computes the default, "gelu_new", faster.
  """
  return transformers.RealmConfig(
    vocab_size=sizes["vocabulary_size"],
    hidden_size=sizes["hidden_dim"],
    num_hidden_layers=sizes["num_layers"],
    num_attention_heads=sizes["num_heads"],
    intermediate_size=sizes["intermediate_dim"],
    max_position_embeddings=sizes["max_sequence_length"],
    retriever_proj_size=len(weights["retriever.cls.dense.bias"]),
    num_candidates=num_candidates,
    hidden_act="gelu_pytorch_tanh",
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
  )


def load(model: nn.Module, weights: Weights, prefix: str) -> None:
  """Loads the weights below a prefix.

  What they lack is unused, or tied to others: the reader's pooler and the heads' output layers.
  """
  own = {
    name.removeprefix(prefix): torch.from_numpy(rows)
    for name, rows in weights.items()
    if name.startswith(prefix)
  }
  unexpected = model.load_state_dict(own, strict=False).unexpected_keys
  if unexpected:
    raise ValueError(f"transformers' {type(model).__name__} has no {', '.join(unexpected)}.")


def inputs_of(batch: Mapping[str, np.ndarray]) -> dict[str, dict[str, Tensor]]:
  """Returns the arguments of the scorer and of the encoder for a batch."""
  tensors = {name: torch.from_numpy(rows).long() for name, rows in batch.items()}
  ids = {name: tensors[f"{name}_ids"] for name in ("query", "passage", "reader")}
  shape = ids["reader"].shape[0], ids["reader"].shape[2]  # [B, L]
  labels, used = torch.full(shape, -100), tensors["target_mask"]
  rows, masks = used.nonzero(as_tuple=True)
  labels[rows, tensors["mask_positions"][rows, masks]] = tensors["targets"][rows, masks]
  scorer = {
    "input_ids": ids["query"],
    "attention_mask": (ids["query"] != 0).long(),
    "candidate_input_ids": ids["passage"],
    "candidate_attention_mask": (ids["passage"] != 0).long(),
    "candidate_token_type_ids": tensors["passage_segments"],
  }
  encoder = {
    "input_ids": ids["reader"],
    "attention_mask": (ids["reader"] != 0).long(),
    "token_type_ids": tensors["reader_segments"],
    "labels": labels,
    "mlm_mask": (labels != -100).long(),
  }
  return {"scorer": scorer, "encoder": encoder}


def open_side(job: Job) -> jobs.Side:
  return RealmStep(job)

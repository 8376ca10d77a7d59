"""The same work in PyTorch, written for speed.

Attention is PyTorch's fused one, a layer's query, key and value are one product, rows are cut to
the longest of their batch, logits are computed at masked positions only, and AdamW is fused. With
bfloat16, training runs under autocast; embedding has bfloat16 weights.
"""

import contextlib
import itertools
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.speed import jobs
from benchmarks.speed.jobs import Job

_NORM_EPSILON = 1e-12
_LAYER_PARTS = {  # ours → published
  "project": "attention.output.dense",
  "attention_norm": "attention.output.LayerNorm",
  "widen": "intermediate.dense",
  "narrow": "output.dense",
  "output_norm": "output.LayerNorm",
}
Weights = Mapping[str, np.ndarray]


# ------------------------------------------------------------------------------------------- models


def _put(module: nn.Module, weights: Weights, *names: str) -> None:
  """Loads a module's weight and bias: those of published names, one above the other."""
  for kind, parameter in module.named_parameters(recurse=False):
    rows = np.concatenate([weights[f"{name}.{kind}"] for name in names])
    parameter.data.copy_(torch.from_numpy(rows))


class Layer(nn.Module):
  """A layer of BERT."""

  def __init__(self, sizes: Mapping, weights: Weights, name: str):
    super().__init__()
    hidden, inner = sizes["hidden_dim"], sizes["intermediate_dim"]
    self.heads = sizes["num_heads"]
    self.split = nn.Linear(hidden, 3 * hidden)
    self.project = nn.Linear(hidden, hidden)
    self.widen = nn.Linear(hidden, inner)
    self.narrow = nn.Linear(inner, hidden)
    self.attention_norm = nn.LayerNorm(hidden, _NORM_EPSILON)
    self.output_norm = nn.LayerNorm(hidden, _NORM_EPSILON)
    parts = [f"{name}attention.self.{part}" for part in ("query", "key", "value")]
    _put(self.split, weights, *parts)
    for ours, theirs in _LAYER_PARTS.items():
      _put(getattr(self, ours), weights, name + theirs)

  def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
    """Maps x [N, L, H]; mask [N, 1, 1, L] bool is False at padding, None if there is none."""
    num, length, hidden = x.shape
    split = self.split(x).view(num, length, 3, self.heads, hidden // self.heads)
    query, key, value = split.permute(2, 0, 3, 1, 4)  # [N, heads, L, H / heads]
    read = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    x = self.attention_norm(x + self.project(read.transpose(1, 2).reshape(num, length, hidden)))
    return self.output_norm(x + self.narrow(F.gelu(self.widen(x), approximate="tanh")))


class Bert(nn.Module):
  """BERT without its pooler."""

  def __init__(self, sizes: Mapping, weights: Weights, name: str):
    super().__init__()
    self.words, self.positions, self.segments = (
      nn.Embedding.from_pretrained(
        torch.from_numpy(weights[f"{name}embeddings.{kind}_embeddings.weight"]), freeze=False
      )
      for kind in ("word", "position", "token_type")
    )
    self.norm = nn.LayerNorm(sizes["hidden_dim"], _NORM_EPSILON)
    _put(self.norm, weights, f"{name}embeddings.LayerNorm")
    self.layers = nn.ModuleList(
      Layer(sizes, weights, f"{name}encoder.layer.{number}.")
      for number in range(sizes["num_layers"])
    )

  def forward(self, token_ids: Tensor, segment_ids: Tensor | None = None) -> Tensor:
    """Encodes ids [N, L] as vectors [N, L, H]."""
    used = token_ids != 0
    mask = None if bool(used.all()) else used[:, None, None]
    segments = self.segments.weight[0] if segment_ids is None else self.segments(segment_ids)
    x = self.words(token_ids) + segments + self.positions.weight[: token_ids.shape[1]]
    x = self.norm(x)
    for layer in self.layers:
      x = layer(x, mask)
    return x


class Tower(nn.Module):
  """The retriever's tower: ids [N, L] → vectors [N, D]."""

  def __init__(self, sizes: Mapping, weights: Weights):
    super().__init__()
    self.bert = Bert(sizes, weights, "retriever.realm.")
    hidden, dim = sizes["hidden_dim"], len(weights["retriever.cls.dense.bias"])
    self.pool, self.project = nn.Linear(hidden, hidden), nn.Linear(hidden, dim)
    self.norm = nn.LayerNorm(dim, _NORM_EPSILON)
    _put(self.pool, weights, "retriever.realm.pooler.dense")
    _put(self.project, weights, "retriever.cls.dense")
    _put(self.norm, weights, "retriever.cls.LayerNorm")

  def forward(self, token_ids: Tensor, segment_ids: Tensor | None = None) -> Tensor:
    first = self.bert(token_ids, segment_ids)[:, 0]
    return self.norm(self.project(torch.tanh(self.pool(first))))


class Reader(nn.Module):
  """BERT with a masked-LM head that is tied to its word embeddings."""

  def __init__(self, sizes: Mapping, weights: Weights):
    super().__init__()
    self.bert = Bert(sizes, weights, "reader.realm.")
    self.transform = nn.Linear(sizes["hidden_dim"], sizes["hidden_dim"])
    self.norm = nn.LayerNorm(sizes["hidden_dim"], _NORM_EPSILON)
    self.bias = nn.Parameter(torch.from_numpy(weights["reader.cls.predictions.bias"]))
    _put(self.transform, weights, "reader.cls.predictions.transform.dense")
    _put(self.norm, weights, "reader.cls.predictions.transform.LayerNorm")

  def forward(self, token_ids: Tensor, segment_ids: Tensor, row: Tensor, at: Tensor) -> Tensor:
    """Vocabulary logits [K, V] at the positions `at` [K] of the rows `row` [K]."""
    masked = self.bert(token_ids, segment_ids)[row, at]  # [K, H]
    hidden = self.norm(F.gelu(self.transform(masked), approximate="tanh"))
    return F.linear(hidden, self.bert.words.weight, self.bias)


class Realm(nn.Module):
  """The loss of REALM, marginalised for each masked word piece."""

  def __init__(self, sizes: Mapping, weights: Weights):
    super().__init__()
    self.tower, self.reader = Tower(sizes, weights), Reader(sizes, weights)

  def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
    count, num, _ = batch["reader_ids"].shape  # B, C

    def flat(name: str) -> Tensor:
      return batch[name].flatten(0, 1)

    example, mask = batch["target_mask"].nonzero(as_tuple=True)  # [K] each
    at, targets = batch["mask_positions"][example, mask], batch["targets"][example, mask]
    row = (example[:, None] * num + torch.arange(num)).flatten()  # [K * C]
    logits = self.reader(
      flat("reader_ids"), flat("reader_segments"), row, at.repeat_interleave(num)
    )
    wrong = F.cross_entropy(logits.float(), targets.repeat_interleave(num), reduction="none")
    queries = self.tower(batch["query_ids"]).float()  # [B, D]
    passages = self.tower(flat("passage_ids"), flat("passage_segments")).float()
    scores = (queries[:, None] * passages.view(count, num, -1)).sum(-1)  # [B, C]
    prior = F.log_softmax(scores, dim=-1)[example]  # [K, C]
    return -torch.logsumexp(prior - wrong.view(-1, num), dim=1).mean()


# --------------------------------------------------------------------------------------------- work


class Optimizer:
  """AdamW with BERT's schedule, clipping, and weight decay of matrices only.

  Args:
    model: the model to train.
    fused: whether one kernel updates a parameter; False is PyTorch's default.
  """

  def __init__(self, model: nn.Module, *, fused: bool):
    self._parameters, self._step = list(model.parameters()), 0
    groups = [
      {"params": [p for p in self._parameters if p.ndim > 1], "weight_decay": jobs.DECAY},
      {"params": [p for p in self._parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    self._adam = torch.optim.AdamW(groups, eps=jobs.EPSILON, fused=fused or None)

  def step(self, loss: Tensor) -> float:
    """Updates the model; returns the loss as a number."""
    self._adam.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(self._parameters, jobs.CLIP_NORM)
    rate, self._step = jobs.learning_rate(self._step), self._step + 1
    for group in self._adam.param_groups:
      group["lr"] = rate
      # TensorFlow adds epsilon before it corrects the bias of the second average.
      group["eps"] = jobs.EPSILON / (1 - group["betas"][1] ** self._step) ** 0.5
    self._adam.step()
    return loss.item()


def cut(arrays: Mapping[str, np.ndarray], ids: str, *others: str) -> dict[str, Tensor]:
  """Returns some arrays, cut to the longest row of `ids` [..., L]."""
  used = (arrays[ids] != 0).reshape(-1, arrays[ids].shape[-1]).any(axis=0)
  length = int(used.nonzero()[0][-1]) + 1
  return {
    name: torch.from_numpy(np.ascontiguousarray(arrays[name][..., :length])).long()
    for name in (ids, *others)
  }


def batches_of(path: str) -> list[dict[str, np.ndarray]]:
  """Reads the batches of a job's inputs."""
  with np.load(path) as arrays:
    stacked = dict(arrays)
  return [
    {name: rows[number] for name, rows in stacked.items()}
    for number in range(len(stacked["query_ids"]))
  ]


def weights_of(job: Job) -> Weights:
  """Reads a job's weights, and sets the number of threads."""
  torch.set_num_threads(job.threads)
  with np.load(job.weights) as arrays:
    return dict(arrays)


class RealmStep:
  """Steps of REALM's loss."""

  def __init__(self, job: Job):
    self.versions = {"torch": torch.__version__}
    self._model = Realm(job.architecture, weights_of(job))
    self._optimizer = Optimizer(self._model, fused=True)
    self._low = job.dtype == "bfloat16"
    self._batches = itertools.cycle(batches_of(job.inputs))

  def write_outputs(self, path: str) -> None:
    np.save(path, [self._loss() for _ in range(jobs.CHECKED_STEPS)])

  def run(self, steps: int) -> float:
    return [self._loss() for _ in range(steps)][-1]

  def _loss(self) -> float:
    """Takes one step; returns its loss."""
    rows = next(self._batches)
    batch = cut(rows, "query_ids")
    batch |= cut(rows, "passage_ids", "passage_segments")
    batch |= cut(rows, "reader_ids", "reader_segments")
    for name in ("mask_positions", "targets", "target_mask"):
      batch[name] = torch.from_numpy(rows[name]).long()
    low = torch.autocast("cpu", torch.bfloat16) if self._low else contextlib.nullcontext()
    with low:
      loss = self._model(batch)
    return self._optimizer.step(loss)


class Embedding:
  """Embeds passages in batches of similar length."""

  def __init__(self, job: Job):
    self.versions = {"torch": torch.__version__}
    self._tower = Tower(job.architecture, weights_of(job)).eval()
    self._tower.to(getattr(torch, job.dtype))
    with np.load(job.inputs) as arrays:
      self._passages = {name: arrays[name] for name in ("token_ids", "segment_ids")}

  def write_outputs(self, path: str) -> None:
    np.save(path, self._embed())

  def run(self, steps: int) -> float:
    return float(np.abs([self._embed() for _ in range(steps)][-1]).sum())

  @torch.inference_mode()
  def _embed(self) -> np.ndarray:
    order = np.argsort((self._passages["token_ids"] != 0).sum(axis=1), kind="stable")
    found = []
    for start in range(0, len(order), jobs.EMBEDDING_BATCH):
      rows = order[start : start + jobs.EMBEDDING_BATCH]
      batch = {name: ids[rows] for name, ids in self._passages.items()}
      found.append(self._tower(*cut(batch, "token_ids", "segment_ids").values()).float().numpy())
    embeddings = np.concatenate(found)
    embeddings[order] = embeddings.copy()
    return embeddings


def open_side(job: Job) -> jobs.Side:
  return RealmStep(job) if job.work == jobs.REALM_STEP else Embedding(job)

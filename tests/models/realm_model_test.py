"""REALM's loss and gradients against the sum over ALL passages, written out in float64.

Also tests what each of its settings changes.
"""

import numpy as np
import pytest
import tensorflow as tf

from realm_tf import settings
from realm_tf.corpus import passages
from realm_tf.examples import packing
from realm_tf.examples.masked_sentences import MaskedSentences
from realm_tf.examples.realm import realm_batch
from realm_tf.models.realm import RETRIEVER_LOSSES, RealmModel
from realm_tf.training import new_models

LENGTHS = dict(query_length=24, passage_length=44)
READER_LENGTH = 64


@pytest.fixture(scope="module")
def parts(toy):
  """Retriever and reader with distinct weights everywhere, and four masked queries.

  Every passage of the corpus is a candidate of each query.
  """
  config = toy.config()
  table, tokenizer = passages.load(config.passages), passages.load_tokenizer(config.passages)
  retriever, reader = (
    new_models.new_retriever(settings.retriever_start(config), tokenizer),
    new_models.new_masked_reader(settings.masked_reader_start(config), tokenizer),
  )
  rng = np.random.default_rng(0)
  for weight in (
    retriever.trainable_weights + reader.trainable_weights
  ):  # fresh ones cannot tell passages apart
    weight.assign(weight + rng.normal(size=weight.shape, scale=0.6).astype(np.float32))
  data = MaskedSentences(
    config.knowledge_spans, tokenizer=tokenizer, query_length=24, max_masks=5, knowledge=table
  )
  queries = data.batch(3, batch_size=4, seed=0)
  numbers = np.tile(np.arange(-1, len(table)), (4, 1))  # the null passage first
  return retriever, reader, batch_of(queries, numbers, table, tokenizer), table


def batch_of(queries, numbers, table, tokenizer) -> dict[str, np.ndarray]:
  query_ids = packing.pack_queries(queries.ids.tensor(), tokenizer=tokenizer, length=24).numpy()
  return realm_batch(
    queries, query_ids, numbers, table, tokenizer=tokenizer, reader_length=READER_LENGTH, **LENGTHS
  )


def by_hand(retriever, reader, batch) -> tuple[np.ndarray, np.ndarray]:
  """Returns f(x, z) [B, C] and log p of masked word pieces [B, C, M] in float64.

  Each masked word piece is computed given each passage, one pair at a time.
  """
  num_queries, num = batch["passage_ids"].shape[:2]
  scores, log_probs = (
    np.zeros([num_queries, num]),
    np.zeros([num_queries, num, batch["targets"].shape[1]]),
  )
  for b in range(num_queries):
    query = np.array(retriever.embed_queries(batch["query_ids"][b : b + 1]), np.float64)[0]
    for c in range(num):
      vector = retriever.embed_passages(
        batch["passage_ids"][b, c][None], batch["passage_segments"][b, c][None]
      )
      scores[b, c] = np.array(vector, np.float64)[0] @ query
      logits = reader(
        {
          "token_ids": batch["reader_ids"][b, c][None],
          "segment_ids": batch["reader_segments"][b, c][None],
          "mask_positions": batch["mask_positions"][b][None],
        }
      )
      weights = np.exp(np.array(logits, np.float64)[0])  # [M, V]
      log_probs[b, c] = np.log(
        weights[np.arange(len(weights)), batch["targets"][b]] / weights.sum(-1)
      )
  return scores, log_probs


@pytest.fixture(scope="module")
def exact(parts):
  retriever, reader, batch, _ = parts
  scores, log_probs = by_hand(retriever, reader, batch)
  prior = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
  return scores, log_probs, prior


def nll(log_probs, prior, mask, *, per_token: bool) -> np.ndarray:
  """Returns −log p(y|x) of each query, or of each mask of the batch.

  It is computed by sums and products of probabilities.
  """
  found = []
  for probs, p, used in zip(np.exp(log_probs), prior, mask > 0, strict=True):
    if per_token:
      found += list(-np.log(p @ probs[:, used]))
    else:
      found.append(-np.log(sum(p[c] * np.prod(probs[c, used]) for c in range(len(p)))))
  return np.array(found)


def loss_of(model, batch):
  batch = {name: tf.constant(value) for name, value in batch.items()}
  outputs = model(batch)
  return model.compute_loss(x=batch, y_pred=outputs), outputs


@pytest.mark.parametrize("per_token", [False, True])
def test_loss_is_the_sum_over_all_passages(parts, exact, per_token):
  retriever, reader, batch, table = parts
  scores, log_probs, prior = exact
  model = RealmModel(retriever, reader, per_token=per_token)
  loss, outputs = loss_of(model, batch)
  wanted = nll(log_probs, prior, batch["target_mask"], per_token=per_token)
  other = nll(log_probs, prior, batch["target_mask"], per_token=not per_token)
  np.testing.assert_allclose(outputs["scores"], scores, atol=1e-5)
  assert len(set(batch["target_mask"].sum(axis=1))) > 1, "queries of different numbers of masks"
  np.testing.assert_allclose(float(loss), wanted.mean(), rtol=1e-5)
  np.testing.assert_allclose(
    float(model.means["loss"].result()), wanted.mean(), rtol=1e-5, err_msg="what is logged"
  )
  assert abs(other.mean() - wanted.mean()) > 0.1 and prior.max() > 2 / len(table)
  # REALM, section 3.3: the best few approximate all
  top = np.argsort(-scores[:, 1:], axis=1)[:, :4] + 1
  cut = np.concatenate([np.zeros([4, 1], int), top], axis=1)
  kept = np.take_along_axis(prior, cut, 1)
  print(
    "with the null passage and the best four instead of all:",
    nll(
      np.take_along_axis(log_probs, cut[..., None], 1),
      kept / kept.sum(-1, keepdims=True),
      batch["target_mask"],
      per_token=per_token,
    ).mean(),
  )


def test_gradients_are_those_of_the_sum(parts, exact):
  """∇θ log p(y|x) = Σ_z r(z) ∇θ f(x,z) with r(z) = [p(y|z,x)/p(y|x) − 1] p(z|x).

  This is REALM, section 3.3; it holds for every weight of the retriever.
  """
  retriever, reader, batch, _ = parts
  _, log_probs, prior = exact
  likelihood = np.exp((log_probs * batch["target_mask"][:, None]).sum(-1))  # [B, C]
  marginal = (likelihood * prior).sum(-1, keepdims=True)
  r = (likelihood / marginal - 1) * prior
  model = RealmModel(retriever, reader)
  with tf.GradientTape(persistent=True) as tape:
    loss, outputs = loss_of(model, batch)
    scores = outputs["scores"]
  np.testing.assert_allclose(tape.gradient(loss, scores), -r / len(r), atol=1e-6)
  got = tape.gradient(loss, retriever.trainable_variables)
  wanted = tape.gradient(
    scores, retriever.trainable_variables, output_gradients=tf.constant(-r / len(r), tf.float32)
  )
  far, size = 0.0, 0.0
  for one, other in zip(got, wanted, strict=True):
    one, other = (tf.convert_to_tensor(part).numpy() for part in (one, other))
    far, size = max(far, np.abs(one - other).max()), max(size, np.abs(other).max())
  np.testing.assert_allclose(r.sum(-1), 0, atol=1e-12)
  assert far < 1e-5 * max(size, 1e-3) and size > 1e-4 and (r > 0).any()


def test_null_passage_switch(parts, exact):
  """Without the null passage the sum is over the other passages only.

  Retrieval utility is not reported.
  """
  retriever, reader, batch, _ = parts
  _, log_probs, prior = exact
  model = RealmModel(retriever, reader, null=False)
  names = ("passage_ids", "passage_segments", "reader_ids", "reader_segments")
  loss, _ = loss_of(model, {**batch, **{name: batch[name][:, 1:] for name in names}})
  without = prior[:, 1:] / prior[:, 1:].sum(-1, keepdims=True)
  wanted = nll(log_probs[:, 1:], without, batch["target_mask"], per_token=False).mean()
  np.testing.assert_allclose(float(loss), wanted, rtol=1e-5)
  utility = model.means["retrieval_utility"]
  assert float(utility.result()) == 0 and float(model.means["loss"].result()) == pytest.approx(
    wanted, rel=1e-5
  )
  with_null = RealmModel(retriever, reader)
  loss_of(with_null, batch)
  given = (log_probs * batch["target_mask"][:, None]).sum(-1)
  by_utility = np.mean(np.log((np.exp(given) * prior).sum(-1)) - given[:, 0])
  np.testing.assert_allclose(
    float(with_null.means["retrieval_utility"].result()), by_utility, rtol=1e-4, atol=1e-6
  )


@pytest.mark.parametrize("retriever_loss", RETRIEVER_LOSSES)
def test_batch_candidates_and_distillation(parts, exact, retriever_loss):
  """p(z|x) over the candidates of the whole batch, and what retriever and reader learn from."""
  retriever, reader, batch, _ = parts
  scores, log_probs, _ = exact
  rng = np.random.default_rng(5)
  read = np.concatenate(
    [np.zeros([4, 1], int), [rng.permutation(np.arange(1, 33))[:3] for _ in range(4)]], axis=1
  )
  names = ("passage_ids", "passage_segments", "reader_ids", "reader_segments")
  given = {**batch, **{name: np.take_along_axis(batch[name], read[..., None], 1) for name in names}}
  unread = (rng.random([4, 16]) < 0.5).astype(np.float32)
  unread[:, ::4] = 0  # null passages
  model = RealmModel(retriever, reader, batch_candidates=True, retriever_loss=retriever_loss)
  with tf.GradientTape(persistent=True) as tape:
    loss, outputs = loss_of(model, {**given, "unread": unread})
    own, others, tokens = (outputs[name] for name in ("scores", "unread_scores", "token_log_probs"))
  # f(x, z) of every query with every candidate of the batch; in `exact` all passages are candidates
  every = scores[:, read.reshape(-1)]
  np.testing.assert_allclose(others, every, atol=1e-5)
  wanted, divergence = [], []
  for b in range(4):
    counted = every[b][unread[b] > 0]
    all_scores = np.concatenate([scores[b][read[b]], counted])
    prior = np.exp(all_scores) / np.exp(all_scores).sum()
    likelihood = np.exp((log_probs[b][read[b]] * batch["target_mask"][b]).sum(-1))
    wanted.append(
      -np.log((prior * np.append(likelihood, np.full(len(counted), likelihood[0]))).sum())
    )
    target = likelihood / likelihood.sum()
    divergence.append((target * np.log(target / prior[:4])).sum())
  distils = retriever_loss == "perplexity_distillation"
  np.testing.assert_allclose(
    float(loss), np.mean(wanted) + distils * np.mean(divergence), rtol=1e-5
  )
  np.testing.assert_allclose(float(model.means["loss"].result()), np.mean(wanted), rtol=1e-5)
  if distils:
    np.testing.assert_allclose(
      float(model.means["distillation"].result()), np.mean(divergence), rtol=1e-5
    )
  gradients = {
    name: tape.gradient(loss, part)
    for name, part in (("own", own), ("others", others), ("tokens", tokens))
  }
  assert all(np.abs(gradient).max() > 1e-6 for gradient in gradients.values())
  assert (np.array(gradients["others"])[unread == 0] == 0).all() and (
    np.array(gradients["others"])[unread > 0] != 0
  ).all()


def test_queries_without_evidence_teach_the_reader_alone(parts):
  """The loss stays, and the gradient of their scores is 0.

  The gradients of the other scores and of the reader do not change.
  """
  retriever, reader, batch, _ = parts
  rng = np.random.default_rng(6)
  unread = (rng.random([4, 4 * batch["passage_ids"].shape[1]]) < 0.1).astype(np.float32)
  model = RealmModel(retriever, reader, batch_candidates=True)
  found = {}
  for name, more in (("all", {}), ("some", {"evidence": np.array([1, 0, 1, 0], np.float32)})):
    with tf.GradientTape() as tape:
      loss, outputs = loss_of(model, {**batch, "unread": unread, **more})
      parts_of = [outputs[key] for key in ("scores", "unread_scores", "token_log_probs")]
    found[name] = float(loss), [np.array(gradient) for gradient in tape.gradient(loss, parts_of)]
  assert found["some"][0] == pytest.approx(found["all"][0], rel=1e-6)
  (own, others, tokens), (all_own, all_others, all_tokens) = found["some"][1], found["all"][1]
  np.testing.assert_allclose(tokens, all_tokens, rtol=1e-5, atol=1e-9)
  for got, wanted in ((own, all_own), (others, all_others)):
    assert (got[[1, 3]] == 0).all() and np.abs(wanted[[1, 3]]).max() > 1e-6
    np.testing.assert_allclose(got[[0, 2]], wanted[[0, 2]], rtol=1e-5, atol=1e-9)


def test_unknown_retriever_loss_and_unread_without_null(parts):
  retriever, reader, *_ = parts
  with pytest.raises(
    ValueError, match="retriever_loss is 'kl'; use one of marginal, perplexity_distillation"
  ):
    RealmModel(retriever, reader, retriever_loss="kl")
  with pytest.raises(ValueError, match="batch_candidates needs the null passage"):
    RealmModel(retriever, reader, null=False, batch_candidates=True)


@pytest.mark.parametrize("shared", [True, False])
def test_towers_train_together_or_apart(toy, parts, shared):
  _, reader, batch, _ = parts
  config = toy.config(retriever__shared=shared)
  retriever = new_models.new_retriever(
    settings.retriever_start(config), passages.load_tokenizer(config.passages)
  )
  model = RealmModel(retriever, reader)
  with tf.GradientTape() as tape:
    loss, _ = loss_of(model, batch)
  gradients = tape.gradient(
    loss,
    [
      retriever.query_tower.projection.kernel.value,
      retriever.passage_tower.projection.kernel.value,
    ],
  )
  sizes = [float(tf.norm(gradient)) for gradient in gradients]
  same = retriever.query_tower is retriever.passage_tower
  assert same == shared and min(sizes) > 0 and (sizes[0] == sizes[1]) == shared

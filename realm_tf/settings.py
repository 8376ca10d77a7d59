"""Conversion of config sections to plain values.

Entry points call these functions at the start; no other code takes a config.
"""

import dataclasses

from realm_tf.training import loop, new_models, open_qa, realm_batches, refresh, warm_start


def schedule(section) -> loop.Schedule:
  """Returns the schedule of a trainer, from its config section."""
  return loop.Schedule(
    steps=section.steps,
    batch_size=section.batch_size,
    learning_rate=section.learning_rate,
    log_every=section.log_every,
    checkpoint_every=section.checkpoint_every,
  )


def setup(config) -> loop.Setup:
  """Returns the settings shared by all trainings of a run; by default, one device and float32."""
  return loop.Setup(
    num_devices=config.get("num_devices", 1),
    mixed_precision=config.get("mixed_precision", False),
    jit_compile=config.jit_compile,
    bias_correction=config.optimizer.bias_correction,
    min_warmup_steps=config.optimizer.min_warmup_steps,
  )


def encoder_start(section) -> new_models.EncoderStart:
  """Returns the initial weights of an encoder, from its config section."""
  return new_models.EncoderStart(
    preset=section.preset,
    sizes={} if section.preset else {name: section[name] for name in new_models.SIZES},
    dropout=section.dropout,
    init_std=section.init_std,
  )


def retriever_start(config) -> new_models.ModelStart:
  """Returns the retriever's initial weights: published, fresh, or of the masked-LM warm start."""
  return new_models.ModelStart(
    encoder=encoder_start(config.encoder),
    arguments=config.retriever.to_dict(),
    warm_start=config.mlm.workdir if config.mlm.steps and config.ict.from_mlm else "",
    setup=setup(config),
  )


def masked_reader_start(config, *, warm_start: bool = True) -> new_models.ModelStart:
  """Returns the masked reader's initial weights; `warm_start` allows the masked-LM warm start."""
  return new_models.ModelStart(
    encoder=encoder_start(config.reader_encoder),
    arguments={"query_length": config.retriever.query_length, **config.reader.to_dict()},
    warm_start=config.mlm.workdir if config.mlm.steps and warm_start else "",
    setup=setup(config),
  )


def span_reader_start(config) -> new_models.ModelStart:
  """Returns the span reader's initial weights: a pre-trained reader's, or `config.encoder`'s."""
  section = config.finetune
  return new_models.ModelStart(
    encoder=encoder_start(config.encoder),
    arguments={
      "query_length": config.retriever.query_length,
      "length": section.reader_length,
      "max_span": section.max_span,
      "span_dim": section.span_dim,
    },
    warm_start=section.reader,
    setup=setup(config),
  )


def lengths(config) -> realm_batches.Lengths:
  """Returns the lengths of packed inputs, in word pieces."""
  return realm_batches.Lengths(
    query_length=config.retriever.query_length,
    passage_length=config.retriever.passage_length,
    title_length=config.retriever.title_length,
    reader_length=config.reader.length,
    max_masks=config.reader.max_masks,
  )


def batches(config) -> realm_batches.BatchSettings:
  """Returns the settings of batches of masked sentences."""
  names = [field.name for field in dataclasses.fields(realm_batches.RealmSettings)]
  return realm_batches.BatchSettings(
    spans=config.spans,
    knowledge_spans=config.knowledge_spans,
    masking=config.masking,
    lengths=lengths(config),
    realm=realm_batches.RealmSettings(**{name: config.realm[name] for name in names}),
    seed=config.seed,
  )


def masked_lm(section) -> warm_start.MaskedLm:
  """Returns a masked-LM stage, from its config section."""
  return warm_start.MaskedLm(
    schedule=schedule(section),
    pretraining_every=section.pretraining_every,
    holders=section.holders,
  )


def refresh_job(config) -> refresh.RefreshJob:
  """Returns the background job that refreshes embeddings and index."""
  return refresh.RefreshJob(
    passages=config.passages,
    searcher=config.searcher,
    start=config.refresh.start_job,
    args=tuple(config.refresh.job_args),
  )


def fine_tuning(config) -> open_qa.FineTuning:
  """Returns the settings for fine-tuning a system."""
  section = config.finetune
  return open_qa.FineTuning(
    passages=config.passages,
    retrieval=section.retrieval,
    retriever=section.retriever,
    num_read=section.num_read,
    beam=section.beam,
    has_answer=section.has_answer,
    slow_factor=section.retriever_learning_rate_ratio,
    sync_steps=section.sync_steps,
    refresh_every_steps=section.refresh_every_steps,
    eval_every=section.eval_every,
    schedule=schedule(section),
    setup=setup(config),
    seed=config.seed,
  )

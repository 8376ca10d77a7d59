"""The closed-book baseline: the masked reader answers from the null passage alone.

The question is followed by [MASK]s; the reader is fine-tuned to fill them with the answer's word pieces and a final [SEP].
"""

import os
import sys
from collections.abc import Mapping, Sequence

import numpy as np

from realm_tf import artifacts, examples, metrics, passages, settings, snapshots, training
from realm_tf.models.masked_reader import MaskedReader
from realm_tf.models.realm import RealmModel
from realm_tf.optimizer import bert_optimizer
from realm_tf.questions import Question, read_questions
from realm_tf.tokenization import Tokenizer

_BATCH_SIZE = 32  # of questions that are answered at once


def inputs(ids: passages.Ragged, rows: np.ndarray, reader: MaskedReader, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
  """The reader's inputs for questions without a passage: reader_ids, reader_segments [B, 1, L], mask_positions [B, M]."""
  masks = reader.max_masks
  queries = [np.append(ids[row][:reader.query_length - 2 - masks], [tokenizer.mask_id] * masks) for row in rows]
  positions = np.array([np.arange(len(query) - masks, len(query)) + 1 for query in queries], np.int32)
  query_ids = passages.Ragged.of(queries, np.int32).tensor()
  packed = examples.pack_reader(query_ids, query_ids[:, :0], tokenizer=tokenizer, query_length=reader.query_length, length=reader.length)
  return {"reader_ids": packed.token_ids.numpy()[:, None], "reader_segments": packed.segment_ids.numpy()[:, None],
          "mask_positions": positions}


def finetune(config, workdir: str, rows: Sequence[Question]) -> str:
  """Trains the masked reader to answer from the question alone; returns the snapshot.

  With `config.finetune.dev_questions` it is the one that answers most of them.

  Raises:
    UserError: all answers are regular expressions, which cannot be written out.
  """
  section, tokenizer = config.finetune, settings.tokenizer(config.passages)
  spelled = [row for row in rows if not row.regex]
  if len(spelled) < len(rows):
    print(f"{len(rows) - len(spelled)} questions left out: their answers are regular expressions", file=sys.stderr)
  if not (rows := spelled):
    raise artifacts.UserError("all answers are regular expressions; finetune.retrieval=none learns answers as they are written.")
  snapshot = snapshots.newest(section.reader, advice="run realm_tf.pretrain first.")
  examples.check_vocabulary(artifacts.read_info(snapshot), snapshot, tokenizer)
  with settings.scope(config):
    reader = snapshots.load_model(snapshot, "reader")
    model = RealmModel(None, reader)
    optimizer = bert_optimizer(
        learning_rate=section.learning_rate, steps=section.steps, **config.optimizer)
  ids = passages.Ragged.of(tokenizer([row.text for row in rows]).to_list(), np.int32)
  answers = [tokenizer(row.answers[:1]).to_list()[0][:reader.max_masks] for row in rows]

  def batch(step: int) -> dict[str, np.ndarray]:
    drawn = examples.epoch_rows(len(rows), step, section.batch_size, config.seed + 3)
    targets = np.full([len(drawn), reader.max_masks], tokenizer.sep_id, np.int32)
    target_mask = np.zeros(targets.shape, np.float32)
    for at, row in enumerate(drawn):
      size = len(answers[row])
      targets[at, :size] = answers[row]
      target_mask[at, :size + 1] = 1
    return {**inputs(ids, drawn, reader, tokenizer), "targets": targets, "target_mask": target_mask}

  def write_snapshot(root: str, step: int, more: Mapping) -> str:
    return snapshots.publish(
        root, step, {"reader": reader}, tokenizer=tokenizer, made_by="finetune",
        details={"retrieval": "none", **more}, inputs={"passages": config.passages})

  def restore(folder: str) -> None:
    reader.set_weights(snapshots.load_model(folder, "reader").get_weights())

  best = None
  if section.dev_questions:
    dev = read_questions(section.dev_questions)
    best = training.KeepBest(
        lambda: exact_match_of(dev, answer([row.text for row in dev], reader, tokenizer)),
        write_snapshot, restore, workdir=workdir, every_steps=section.eval_every, steps=section.steps)
  training.train(
      model, batch, workdir=workdir, steps=section.steps, log_every=section.log_every,
      checkpoint_every=section.checkpoint_every, batch_size=section.batch_size,
      jit_compile=config.jit_compile, optimizer=optimizer, best=best)
  said = best.take() if best else {}
  return write_snapshot(os.path.join(workdir, "snapshots"), section.steps, said)


def answer(texts: Sequence[str], reader: MaskedReader, tokenizer: Tokenizer) -> list[str]:
  """The most likely word pieces up to the first [SEP], as text."""
  ids, said = passages.Ragged.of(tokenizer(list(texts)).to_list(), np.int32), []
  for start in range(0, len(texts), _BATCH_SIZE):
    made = inputs(ids, np.arange(start, min(start + _BATCH_SIZE, len(texts))), reader, tokenizer)
    logits = reader({
        "token_ids": made["reader_ids"][:, 0], "segment_ids": made["reader_segments"][:, 0],
        "mask_positions": made["mask_positions"]})
    for row in np.argmax(logits, axis=-1):
      end = np.flatnonzero(row == tokenizer.sep_id)
      said.append(tokenizer.spell(row[:end[0] if len(end) else None]))
  return said


def exact_match_of(rows: Sequence[Question], texts: Sequence[str]) -> float:
  """The share of questions whose answer is right."""
  return float(np.mean([metrics.exact_match(text, row.answers, regex=row.regex)
                        for row, text in zip(rows, texts, strict=True)]))

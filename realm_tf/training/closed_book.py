"""The closed-book baseline: the masked reader answers from the null passage alone.

The question is followed by [MASK]s; the reader is fine-tuned to fill them with the answer's word
pieces and a final [SEP].
"""

import os
import sys
from collections.abc import Sequence

import numpy as np

from realm_tf.corpus import metrics, passages
from realm_tf.corpus.tokenization import Tokenizer
from realm_tf.examples import epochs, packing, questions
from realm_tf.examples.questions import Question, read_questions
from realm_tf.models import snapshots
from realm_tf.models.masked_reader import MaskedReader
from realm_tf.models.realm import RealmModel
from realm_tf.storage import artifacts
from realm_tf.storage.columns import Ragged
from realm_tf.systems.closed_book import answer, inputs
from realm_tf.systems.workdir import CLOSED_BOOK, fine_tuned
from realm_tf.training import loop


def finetune(
  rows: Sequence[Question],
  workdir: str,
  *,
  passages_folder: str,
  reader_workdir: str,
  dev_questions: str,
  eval_every: int,
  schedule: loop.Schedule,
  setup: loop.Setup,
  seed: int,
) -> str:
  """Trains the masked reader to answer from the question alone; returns the snapshot.

  Args:
    rows: the questions.
    workdir: workdir of the trainer.
    passages_folder: passages folder with the tokenizer.
    reader_workdir: workdir whose newest snapshot has the reader to train.
    dev_questions: file of questions; the snapshot that answers most of them is published. If "",
      the last snapshot is published.
    eval_every: steps between two evaluations on the dev questions.
    schedule: schedule of the training.
    setup: devices, precision and optimizer.
    seed: seed of the batches.

  Raises:
    UserError: all answers are regular expressions, which cannot be spelled out.
  """
  # ---- Inputs
  tokenizer = passages.load_tokenizer(passages_folder)
  rows = _spelled_out(rows)
  snapshot = snapshots.newest(reader_workdir, advice="run realm_tf.pretrain first.")
  packing.check_vocabulary(artifacts.read_info(snapshot), snapshot, tokenizer)
  with setup.scope():
    reader = snapshots.load_model(snapshot, "reader")
    model = RealmModel(None, reader)
    optimizer = setup.optimizer(schedule)
  data = Examples(rows, reader, tokenizer)

  # ---- Training
  write_snapshot = snapshots.publisher(
    {"reader": reader},
    tokenizer=tokenizer,
    made_by="finetune",
    details=fine_tuned(CLOSED_BOOK),
    inputs={"passages": passages_folder},
  )

  def restore(folder: str) -> None:
    reader.set_weights(snapshots.load_model(folder, "reader").get_weights())

  best = None
  if dev_questions:
    dev = read_questions(dev_questions)
    best = loop.KeepBest(
      lambda: exact_match_of(dev, answer([row.text for row in dev], reader, tokenizer)),
      write_snapshot,
      restore,
      workdir=workdir,
      every_steps=eval_every,
      steps=schedule.steps,
    )
  loop.train(
    model,
    lambda step: data.batch(step, batch_size=schedule.batch_size, seed=seed + 3),
    workdir=workdir,
    schedule=schedule,
    jit_compile=setup.jit_compile,
    optimizer=optimizer,
    best=best,
    made_from={"questions": questions.fingerprint_of(rows)},
  )
  said = best.take() if best else {}
  return write_snapshot(os.path.join(workdir, "snapshots"), schedule.steps, said)


def _spelled_out(rows: Sequence[Question]) -> list[Question]:
  """Returns the questions with literal answers; prints how many are left out.

  Raises:
    UserError: there are none.
  """
  spelled = [row for row in rows if not row.regex]
  if len(spelled) < len(rows):
    print(
      f"{len(rows) - len(spelled)} questions left out: their answers are regular expressions",
      file=sys.stderr,
    )
  if not spelled:
    raise artifacts.UserError(
      "all answers are regular expressions, but finetune.retrieval=none learns to write answers "
      "out. Use questions with literal answers."
    )
  return spelled


class Examples:
  """Questions whose answers the reader learns to write out.

  Args:
    rows: the questions; the first answer of each is the target.
    reader: the reader to train.
    tokenizer: tokenizer of the reader.
  """

  def __init__(self, rows: Sequence[Question], reader: MaskedReader, tokenizer: Tokenizer):
    self.reader, self.tokenizer = reader, tokenizer
    self.ids = Ragged.of(tokenizer([row.text for row in rows]).to_list(), np.int32)
    answers = tokenizer([row.answers[0] for row in rows]).to_list()
    self.answers = [ids[: reader.max_masks] for ids in answers]

  def batch(self, step: int, *, batch_size: int, seed: int) -> dict[str, np.ndarray]:
    """Returns the inputs of the reader, targets [B, M] int32 and target_mask [B, M] float32."""
    drawn = epochs.epoch_rows(len(self.answers), step, batch_size, seed)
    targets = np.full([len(drawn), self.reader.max_masks], self.tokenizer.sep_id, np.int32)
    target_mask = np.zeros(targets.shape, np.float32)
    for at, row in enumerate(drawn):
      size = len(self.answers[row])
      targets[at, :size] = self.answers[row]
      target_mask[at, : size + 1] = 1
    found = inputs(self.ids, drawn, self.reader, self.tokenizer)
    return {**found, "targets": targets, "target_mask": target_mask}


def exact_match_of(rows: Sequence[Question], texts: Sequence[str]) -> float:
  """Returns the share of questions whose answer is right."""
  return float(
    np.mean(
      [
        metrics.exact_match(text, row.answers, regex=row.regex)
        for row, text in zip(rows, texts, strict=True)
      ]
    )
  )

"""Open-QA fine-tuning of the question tower and a span reader (ORQA, section 5).

By default, passage embeddings and index stay fixed.

    python -m realm_tf.finetune --config=configs/quickstart.py --workdir=runs/quickstart/finetune

`config.finetune.retrieval` chooses the system: "dense" (the retriever of a snapshot), or one of the
baselines, "bm25" (the same reader over BM25's passages) and "none" (closed book). With
`config.finetune.refresh_every_steps` the passage tower trains too, and embeddings and index are
refreshed as in pre-training. With `config.finetune.dev_questions` the snapshot with the best exact
match is published. If interrupted, run it again with the same workdir to resume.
"""

from collections.abc import Sequence

from realm_tf import cli

if __name__ == "__main__":
  cli.start_trainer("realm_tf.finetune", section="finetune")

import keras

from realm_tf import settings
from realm_tf.corpus import passages
from realm_tf.examples import questions
from realm_tf.examples.open_qa import QaExamples
from realm_tf.models import snapshots
from realm_tf.training import closed_book, new_models, open_qa


def finetune(config, workdir: str) -> str:
  """Trains the system that `config.finetune.retrieval` names; returns its snapshot's folder.

  Raises:
    ArtifactError: inputs are missing, or do not belong together.
    UserError: there is no usable question, or a setting is not valid.
  """
  # ---- Settings
  how, job = settings.fine_tuning(config), settings.refresh_job(config)
  reader_start = settings.span_reader_start(config)
  questions_path, dev_path = config.finetune.questions, config.finetune.dev_questions

  # ---- Inputs
  keras.utils.set_random_seed(how.seed)
  how.check(has_dev=bool(dev_path))
  rows = questions.read_questions(questions_path)
  if how.retrieval == "none":
    return closed_book.finetune(
      rows,
      workdir,
      passages_folder=how.passages,
      reader_workdir=reader_start.warm_start,
      dev_questions=dev_path,
      eval_every=how.eval_every,
      schedule=how.schedule,
      setup=how.setup,
      seed=how.seed,
    )
  table, tokenizer = passages.load(how.passages), passages.load_tokenizer(how.passages)
  reader = new_models.new_span_reader(reader_start, tokenizer)
  base = snapshots.newest(how.retriever, advice="run realm_tf.pretrain first.")
  sizes = snapshots.model_config(base, "retriever")["config"]

  def ask(rows: Sequence[questions.Question]) -> QaExamples:
    return QaExamples(
      rows,
      table,
      tokenizer=tokenizer,
      search=None,
      embeddings=None,
      reader=reader,
      num_read=how.num_read,
      passage_length=sizes["passage_length"] if how.refreshed else 0,
      title_length=sizes.get("title_length"),
      raw=how.has_answer == "raw",
    )

  data = ask(rows)
  dev = ask(questions.read_questions(dev_path)) if dev_path else None

  # ---- Training
  if how.refreshed:
    return open_qa.train_both_towers(how, workdir, data=data, dev=dev, base=base, job=job)
  return open_qa.train_question_tower(how, workdir, data=data, dev=dev, base=base)

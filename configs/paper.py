"""The paper's own sizes: BERT-base towers and reader, 13,353,718 passages, 64 accelerators.

    python -m realm_tf.pipeline --config=configs/paper.py:nq --config.data_dir=gs://BUCKET/data

After the colon the questions: nq, webquestions or curatedtrec; `nq+cc_news` pre-trains on another corpus than it retrieves from.
DATA holds
  wikipedia/: 20 December 2018, WikiExtractor's files
  cc_news/: articles as jsonl
  bert/: BERT-base uncased, config.json, model.safetensors, vocab.txt
  nq/, webquestions/, curatedtrec/: what `realm_tf.prepare_questions` writes
  tagger/: BERT as it learns names from CoNLL-2003, whose files are eng.train and eng.testb:

    python -m realm_tf.train_tagger --config=configs/tagger.py --workdir=DATA/tagger \\
        --config.encoder.preset=DATA/bert --config.tagger.train=DATA/conll2003/eng.train \\
        --config.tagger.held_out=DATA/conll2003/eng.testb --config.tagger.length=128 \\
        --config.tagger.steps=1320 --config.tagger.batch_size=32 --config.tagger.learning_rate=5e-5

Where the paper is silent, values are the released code's. Expected exact match: nq 39.2 (40.4 with
cc_news), webquestions 40.2 (40.7), curatedtrec 46.8 (42.9). Nobody has run it whole with this code
yet: one step of each stage at full size is tested.
"""

from configs import quickstart

QUESTIONS = {"nq": 79_168, "webquestions": 3_417, "curatedtrec": 1_353}  # in the training part
_EPOCHS = 20


def get_config(variant: str = "nq"):
  dataset, _, another = variant.partition("+")
  if dataset not in QUESTIONS or another not in ("", "cc_news"):
    raise ValueError(f"configs/paper.py:{variant} is unknown; wanted one of {', '.join(QUESTIONS)}, or one of them and +cc_news.")
  c = quickstart.get_config()
  c.run_dir = f"runs/paper-{variant}"
  c.data_dir = "data"
  data = c.get_ref("data_dir")

  c.corpus.update(builtin=False, max_tokens=288)
  c.corpus.knowledge = data + "/wikipedia/*/wiki_*"
  c.corpus.pretraining = data + "/cc_news/*.jsonl" if another else ""
  c.corpus.vocab = data + "/bert"
  c.corpus.tagger = data + "/tagger/tagger"  # the paper's: BERT, trained on CoNLL-2003
  if not another:
    c.spans = c.get_ref("run_dir") + "/spans-knowledge"
  c.dev_clozes = ""

  c.encoder.update(
      num_layers=12, num_heads=12, hidden_dim=768, intermediate_dim=3072, max_sequence_length=512, dropout=0.1, init_std=0.02)
  c.encoder.preset = data + "/bert"
  c.retriever.update(projection_dim=128, query_length=96, passage_length=288, pooling="cls", shared=True, dropout=0.1, scale=1.0)
  c.reader.update(length=384, max_masks=10)

  c.optimizer.update(bias_correction=False, min_warmup_steps=100)  # as released
  c.mlm.steps = 0  # a published BERT instead
  c.warmup.steps = 0
  c.ict.update(steps=100_000, batch_size=4096, learning_rate=1e-4, removal_rate=0.9, query_length=64, log_every=100,
               checkpoint_every=1_000)
  c.searcher = "scann"
  c.realm.update(
      steps=200_000, batch_size=512, learning_rate=3e-5, retriever_learning_rate_ratio=1.0, num_candidates=8, null_passage=True,
      drop_own_passage=True, per_token=False,
      sampling="passages", log_every=100, checkpoint_every=500)
  c.refresh.every_steps = 500

  c.finetune.update(
      steps=QUESTIONS[dataset] * _EPOCHS // 1_000 * 1_000, batch_size=1, learning_rate=1e-5, retriever_learning_rate_ratio=1.0,
      beam=5_000, has_answer="raw", num_read=5, reader_length=320, max_span=10, span_dim=256, sync_steps=1, log_every=1_000,
      checkpoint_every=10_000)
  c.finetune.questions = data + f"/{dataset}/train.jsonl"
  c.finetune.dev_questions = data + f"/{dataset}/dev.jsonl"
  c.finetune.eval_every = QUESTIONS[dataset] // 1_000 * 1_000  # once an epoch
  c.evaluate.update(clozes="", systems=("realm",))
  c.evaluate.questions = data + f"/{dataset}/test.jsonl"
  return c

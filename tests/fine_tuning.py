"""Fine-tunes and scores toy systems by their names."""

from realm_tf import evaluate, finetune

SYSTEMS = ("dense", "bm25", "none")


def fine_tune(toy, workdir: str, retrieval: str, **values) -> str:
  return finetune.finetune(toy.config(finetune__retrieval=retrieval, **values), workdir)


def score(workdir: str, **what) -> dict[str, float]:
  return evaluate.evaluate(
    workdir,
    **{
      "questions_path": None,
      "clozes_path": None,
      "output": None,
      "bm25_baseline": False,
      "index_folder": None,
      "passages_folder": None,
      "num_passages": 5,
    }
    | what,
  )

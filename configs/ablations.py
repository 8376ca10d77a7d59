"""The paper's Table 2 on the built-in corpus: the quickstart, shorter.

    python -m benchmarks.ablations --config=configs/ablations.py --seeds=0,1,2

Four pre-trainings of 600 steps and seven fine-tunings of 500 for each seed.
"""

from configs import quickstart


def get_config():
  c = quickstart.get_config()
  c.run_dir = "runs/ablations"
  c.realm.update(steps=600, checkpoint_every=200)
  c.refresh.every_steps = 40  # and 1,200 for the stale index: it is the first one all the way
  c.evaluate.clozes = ""
  c.servable = ""
  return c

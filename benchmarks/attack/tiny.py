"""configs/quickstart.py, so small that starting a command takes longer than its work.

There is no refresh during training, and fine-tuning searches with the tower that it starts from.
When a new index or new weights arrive depends on the machine, and so would the result of training.
"""

from configs import quickstart


def get_config():
  c = quickstart.get_config()
  c.run_dir = "runs/attack"
  c.corpus.num_entities = 16
  c.corpus.vocab_size = 600
  c.encoder.update(num_layers=1, num_heads=2, hidden_dim=16, intermediate_dim=32)
  c.retriever.projection_dim = 8
  c.mlm.update(steps=6, batch_size=4, log_every=2, checkpoint_every=2)
  c.ict.update(steps=6, batch_size=4, log_every=2, checkpoint_every=2)
  c.warmup.update(steps=4, batch_size=4, log_every=2, checkpoint_every=2)
  c.realm.update(steps=8, batch_size=4, log_every=2, checkpoint_every=2, num_candidates=3)
  c.refresh.update(every_steps=8, job_args=("--poll_secs=0.1", "--nojit_compile"))
  c.finetune.update(
    steps=6,
    batch_size=4,
    beam=8,
    num_read=2,
    span_dim=8,
    log_every=2,
    checkpoint_every=2,
    sync_steps=100,
  )
  c.evaluate.systems = ("realm",)
  return c

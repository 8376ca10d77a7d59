"""REALM on one accelerator: packs a corpus where everything is installed, trains where JAX, Keras and KerasHub are.

    python -m benchmarks.accelerator --pack=RUN --questions=Q.jsonl,R.jsonl --output=PACKED.npz
    KERAS_BACKEND=jax python -m benchmarks.accelerator --data=PACKED.npz --output=results.json

RUN holds passages/ and spans/, of beam_jobs.make_passages and annotate_spans. `--set=scratch.realm.steps=100` changes a stage,
`--set=sizes.layers=6` a size; docs/accelerator.md tells the rest.
"""

import dataclasses
import platform
import sys
import time

from absl import app, flags

_FLAGS = {
    "pack": flags.DEFINE_string("pack", None, "Folder with passages/ and spans/ to pack."),
    "questions": flags.DEFINE_list("questions", [], "Files of {\"question\", \"answer\", \"title\"} to pack along."),
    "encoder": flags.DEFINE_string("encoder", "", "Folder of a published BERT to pack along."),
    "max_clozes": flags.DEFINE_integer("max_clozes", 400_000, "Most masked sentences to pack."),
    "length": flags.DEFINE_integer("length", 128, "Word pieces of packed passages."),
    "data": flags.DEFINE_string("data", None, "Packed data to train on."),
    "start": flags.DEFINE_list("start", ["scratch", "published"], "What to start from, in this order."),
    "set": flags.DEFINE_multi_string("set", [], "START.STAGE.NAME=VALUE or sizes.NAME=VALUE."),
    "most_steps": flags.DEFINE_integer("most_steps", None, "Stops every stage there, to try things out."),
    "seed": flags.DEFINE_integer("seed", 0, "Of weights and batches."),
    "output": flags.DEFINE_string("output", None, "File to write.", required=True),
}


def main(argv) -> None:
  del argv
  started, values = time.monotonic(), {name: holder.value for name, holder in _FLAGS.items()}
  if bool(values["pack"]) == bool(values["data"]):
    sys.exit("give either --pack (a folder to pack) or --data (packed data to train on).")
  if values["pack"]:
    pack(values)
  else:
    train(values)
  print(f"{values['output']}: {time.monotonic() - started:.0f} s", flush=True)


def pack(values: dict) -> None:
  """Packs a corpus; needs TensorFlow."""
  from benchmarks.accelerator import experiment, packing
  from realm_tf import errors

  sizes = experiment.Sizes()
  try:
    packing.pack(values["pack"], values["questions"], values["output"], length=values["length"], max_clozes=values["max_clozes"],
                 encoder=values["encoder"], query_length=sizes.query_length, max_masks=sizes.max_masks, seed=values["seed"])
  except errors.UserError as error:
    sys.exit(str(error))


def train(values: dict) -> None:
  """Trains on packed data; needs Keras' JAX backend."""
  import jax
  import keras

  from benchmarks.accelerator import experiment
  from benchmarks.accelerator.packed import Packed

  if keras.backend.backend() != "jax":
    sys.exit(f"Keras' backend is {keras.backend.backend()}; set KERAS_BACKEND=jax.")
  keras.config.disable_flash_attention()  # cuDNN's wants a mask for every query position, and each layer would try it and fail
  data = Packed.load(values["data"])
  plans, sizes = experiment.plans(), experiment.Sizes()
  for setting in values["set"]:
    change(setting, plans, sizes)
  device = jax.devices()[0]
  report = experiment.Report(values["output"], {
      "device": device.device_kind, "platform": device.platform, "jax": jax.__version__, "keras": keras.__version__,
      "python": platform.python_version(), "seed": values["seed"], "passages": len(data.text_counts), "clozes": len(data.span_counts),
      "sizes": dataclasses.asdict(sizes)})
  report({"start": "bm25", "stage": "start", "recall": experiment.score(data, data.bm25)})
  for start in values["start"]:
    if start == experiment.PUBLISHED and not data.encoder:
      print(f"{values['data']} holds no published encoder; --encoder packs one along. Left out.", flush=True)
      continue
    experiment.Experiment(start, data, sizes=sizes, stages=plans[start], seed=values["seed"], most_steps=values["most_steps"],
                          report=report).run()


def change(setting: str, plans: dict, sizes) -> None:
  """Applies one --set; exits where there is no such name."""
  path, _, text = setting.partition("=")
  *parts, name = path.split(".")
  target = sizes if parts == ["sizes"] else plans.get(parts[0], {}).get(parts[-1]) if len(parts) == 2 else None
  if target is None or not hasattr(target, name):
    stages = ", ".join(f"{start}.{stage}" for start, plan in plans.items() for stage in plan)
    sys.exit(f"--set={setting}: no such setting; wanted NAME=VALUE of sizes or of {stages}.")
  try:
    setattr(target, name, type(getattr(target, name))(text))
  except ValueError:
    sys.exit(f"--set={setting}: {text!r} is not {type(getattr(target, name)).__name__}.")


if __name__ == "__main__":
  app.run(main)

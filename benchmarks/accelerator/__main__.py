"""Runs REALM on one accelerator: measures speed, memory, and recall after each stage.

Packing needs a full installation; training needs only JAX, Keras and KerasHub.

    python -m benchmarks.accelerator --pack=RUN --questions=Q.jsonl,R.jsonl --output=PACKED.npz
    KERAS_BACKEND=jax python -m benchmarks.accelerator --data=PACKED.npz --output=results.json

RUN holds passages/ and spans/, written by beam_jobs.make_passages and annotate_spans.
`--set=scratch.realm.steps=100` changes a stage, `--set=sizes.layers=6` a size. See
docs/accelerator.md.
"""

import dataclasses
import platform
import sys
import time
from collections.abc import Sequence

from absl import flags

from realm_tf import cli

if __name__ == "__main__":
  flags.DEFINE_string("pack", None, "Folder with passages/ and spans/ to pack.")
  flags.DEFINE_list("questions", [], "Files of {question, answer, title} lines to include.")
  flags.DEFINE_string("encoder", "", "Folder of a published BERT to include.")
  flags.DEFINE_integer("max_clozes", 400_000, "Maximum number of masked sentences to pack.")
  flags.DEFINE_integer("length", 128, "Word pieces in packed passages.")
  flags.DEFINE_integer("title_length", None, "Word pieces taken of a title; default: half.")
  flags.DEFINE_string("data", None, "Packed data to train on.")
  flags.DEFINE_list("start", ["scratch", "published"], "Starts to train from, in this order.")
  flags.DEFINE_multi_string("set", [], "START.STAGE.NAME=VALUE or sizes.NAME=VALUE.")
  flags.DEFINE_integer("most_steps", None, "Limit of steps of every stage, for trying a machine.")
  flags.DEFINE_integer("seed", 0, "Seed of weights and batches.")
  flags.DEFINE_string("output", None, "File to write.", required=True)
  cli.start("benchmarks.accelerator.__main__")


def main(argv: Sequence[str]) -> None:
  del argv
  args, started = flags.FLAGS, time.monotonic()
  if bool(args.pack) == bool(args.data):
    sys.exit("give either --pack (a folder to pack) or --data (packed data to train on).")
  if args.pack:
    pack(
      args.pack,
      args.questions,
      args.output,
      encoder=args.encoder,
      length=args.length,
      title_length=args.title_length,
      max_clozes=args.max_clozes,
      seed=args.seed,
    )
  else:
    train(
      args.data,
      args.output,
      starts=args.start,
      settings=args.set,
      most_steps=args.most_steps,
      seed=args.seed,
    )
  print(f"{args.output}: {time.monotonic() - started:.0f} s", flush=True)


def pack(
  run: str,
  questions: Sequence[str],
  output: str,
  *,
  encoder: str,
  length: int,
  title_length: int | None,
  max_clozes: int,
  seed: int,
) -> None:
  """Packs a corpus; needs TensorFlow. See `packing.pack`."""
  from benchmarks.accelerator import experiment, packing  # here, because they need TensorFlow
  from realm_tf import errors

  sizes = experiment.Sizes()
  try:
    packing.pack(
      run,
      questions,
      output,
      length=length,
      title_length=title_length,
      max_clozes=max_clozes,
      encoder=encoder,
      query_length=sizes.query_length,
      max_masks=sizes.max_masks,
      seed=seed,
    )
  except errors.UserError as error:
    sys.exit(f"{type(error).__name__}: {error}")


def train(
  path: str,
  output: str,
  *,
  starts: Sequence[str],
  settings: Sequence[str],
  most_steps: int | None,
  seed: int,
) -> None:
  """Trains on packed data; needs Keras' JAX backend.

  Args:
    path: path of the packed data.
    output: JSON file to write.
    starts: starts from `experiment.plans`, in order.
    settings: see --set.
    most_steps: limit of steps of any stage.
    seed: seed of weights and batches.
  """
  import jax  # here, because packing does not need it
  import keras

  from benchmarks.accelerator import evaluation, experiment
  from benchmarks.accelerator.packed import Packed

  if keras.backend.backend() != "jax":
    sys.exit(f"Keras' backend is {keras.backend.backend()}; set KERAS_BACKEND=jax.")
  # cuDNN's implementation needs a mask for every query position: each layer would try it and fail.
  keras.config.disable_flash_attention()
  data = Packed.load(path)
  plans, sizes = experiment.plans(), experiment.Sizes()
  for setting in settings:
    change(setting, plans, sizes)
  device = jax.devices()[0]
  report = evaluation.Report(
    output,
    {
      "device": device.device_kind,
      "platform": device.platform,
      "jax": jax.__version__,
      "keras": keras.__version__,
      "python": platform.python_version(),
      "seed": seed,
      "passages": len(data.text_counts),
      "clozes": len(data.span_counts),
      "sizes": dataclasses.asdict(sizes),
    },
  )
  report({"start": "bm25", "stage": "start", "recall": evaluation.score(data, data.bm25)})
  for start in starts:
    if start == experiment.PUBLISHED and not data.encoder:
      print(f"{path} has no published encoder; include one with --encoder. Skipped.", flush=True)
      continue
    experiment.Experiment(
      start, data, sizes=sizes, stages=plans[start], seed=seed, most_steps=most_steps, report=report
    ).run()


def change(setting: str, plans: dict, sizes) -> None:
  """Applies one --set; exits if there is no such name."""
  path, _, text = setting.partition("=")
  *parts, name = path.split(".")
  target = (
    sizes
    if parts == ["sizes"]
    else plans.get(parts[0], {}).get(parts[-1])
    if len(parts) == 2
    else None
  )
  if target is None or not hasattr(target, name):
    stages = ", ".join(f"{start}.{stage}" for start, plan in plans.items() for stage in plan)
    sys.exit(f"--set={setting}: no such setting; wanted NAME=VALUE of sizes or of {stages}.")
  kind = type(getattr(target, name))
  try:
    value = [int(part) for part in text.split(",") if part] if kind is tuple else text
    setattr(target, name, kind(value))
  except ValueError:
    sys.exit(f"--set={setting}: {text!r} is not {kind.__name__}.")

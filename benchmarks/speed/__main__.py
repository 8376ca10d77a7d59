"""Times REALM's steps and embedding beside PyTorch and transformers, in turn, on this machine.

    python -m benchmarks.speed --work=realm_step
    python -m benchmarks.speed --work=embedding --passages=P --sizes=2x128

Each side is a process with as many threads as there are cores, and all sides have the same weights
and inputs. Before anything is timed, their losses or embeddings are compared; if they differ, the
command fails. The sides then run in turn, and wait while another one runs. The peers' environments
are made on the first run. P is a folder of beam_jobs.make_passages; without it, passages have
random word pieces and the lengths of Wikipedia's. See docs/performance.md.
"""

import json
import os
import shlex
import sys
from collections.abc import Sequence

from absl import flags

from benchmarks import environments
from benchmarks.speed.jobs import WORKS
from realm_tf import cli

if __name__ == "__main__":
  flags.DEFINE_enum("work", None, WORKS, "What to time.", required=True)
  flags.DEFINE_list("sizes", ["2x128", "6x384", "12x768"], "Sizes of the encoders: layers x width.")
  flags.DEFINE_list("batch_sizes", ["4", "16"], "Examples in a REALM step.")
  flags.DEFINE_list("lengths", ["full", "real"], "full: no padding; real: lengths of a corpus.")
  flags.DEFINE_string("passages", None, "Passages folder for real lengths.")
  flags.DEFINE_integer("num_passages", 5000, "Passages to draw, or to embed.", lower_bound=8)
  flags.DEFINE_list("sides", [], "Sides to time; all by default.")
  flags.DEFINE_integer("rounds", 7, "How often each side has its turn.", lower_bound=1)
  flags.DEFINE_float("secs", 5, "Duration of a turn; at least one step.", lower_bound=0)
  flags.DEFINE_string("environments", environments.ROOT, "Folder for the environments.")
  flags.DEFINE_string("output", None, "Folder for the results; runs/speed/<work> by default.")
  cli.start("benchmarks.speed.__main__")

from benchmarks.speed import cases, report, sides
from realm_tf.storage import artifacts


def main(argv: Sequence[str]) -> None:
  del argv
  args = flags.FLAGS
  names = sides.named(args.sides, args.work)
  found = cases.cases_of(
    args.work,
    sizes=args.sizes,
    lengths=args.lengths,
    batch_sizes=args.batch_sizes,
    passages=args.passages,
    num_passages=args.num_passages,
  )
  for environment in sorted(set(filter(None, map(sides.environment_of, names)))):
    environments.make(args.environments, environment)
  output = args.output or os.path.join("runs/speed", args.work)
  results = {
    "work": args.work,
    "command": shlex.join(["python", "-m", "benchmarks.speed", *sys.argv[1:]]),
    "machine": report.machine(),
    "rounds": args.rounds,
    "secs": args.secs,
    "rows": [],
  }
  for case in found:
    row = cases.measure(
      case, names, rounds=args.rounds, secs=args.secs, environments_root=args.environments
    )
    results["rows"].append(row)
    write(results, output)
    print(report.table_of(results), flush=True)


def write(results: dict, folder: str) -> None:
  """Writes the table, the results and the plot."""
  artifacts.gfile.makedirs(folder)
  artifacts.write_text(os.path.join(folder, "table.txt"), report.table_of(results))
  text = json.dumps(results, indent=2) + "\n"
  artifacts.write_text(os.path.join(folder, "results.json"), text)
  report.plot(results, os.path.join(folder, "speed.png"))

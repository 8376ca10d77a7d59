"""Makes the index of the newest snapshot, once or continuously.

    python -m beam_jobs.refresh_index --snapshots=W/snapshots --passages=P --indexes=W/indexes

Run it with --watch next to a trainer: this is the asynchronous refresh of REALM, section 3.3, for
which training never waits.

With --watch it always takes the newest snapshot, skipping any published in between, and reuses the
compiled tower from one refresh to the next. It also refreshes whenever the passages have been
updated, and then embeds the new segments only. Flags that are not given are as the newest index in
--indexes was made. Beam's options follow `--`.
"""

import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from absl import flags

from beam_jobs import index_flags
from realm_tf import cli

if __name__ == "__main__":
  flags.DEFINE_string(
    "snapshots", None, "The folder that holds a trainer's snapshots.", required=True
  )
  flags.DEFINE_string("passages", None, "The passages folder.", required=True)
  flags.DEFINE_string("indexes", None, "The folder to write the indexes to.", required=True)
  index_flags.define()
  flags.DEFINE_bool(
    "watch", False, "Keep running, and refresh for every newer snapshot and every update."
  )
  flags.DEFINE_float("poll_secs", 1.0, "Seconds between two checks for a newer snapshot.")
  flags.DEFINE_integer("keep", 2, "How many indexes to keep.", lower_bound=1)
  flags.DEFINE_integer(
    "parent_pid",
    None,
    "Process that started this one (realm_tf.training.refresh); this one ends when it ends.",
  )
  cli.start_job("beam_jobs.refresh_index")

import tensorflow as tf

from beam_jobs import embedding
from realm_tf.retrieval import index
from realm_tf.retrieval.index_config import IndexConfig
from realm_tf.storage import artifacts, ownership, paths, writers
from realm_tf.training import refresh


def refresh_newest(
  *, snapshots: str, passages: str, indexes: str, config: IndexConfig, keep: int, embed: Callable
) -> str:
  """Publishes the index of the newest snapshot, unless it exists.

  Args:
    snapshots: the folder of numbered snapshot folders.
    passages: the passages folder.
    indexes: the folder of numbered index folders.
    config: how to embed, and which searcher to build.
    keep: how many indexes to keep.
    embed: `embedding.embed` with the constant settings applied.

  Returns:
    The index folder.

  Raises:
    ArtifactError: there is no snapshot, another process is making an index in this folder, or
      `embed` raises it.
  """
  while (snapshot := artifacts.latest(snapshots)) is not None:
    step, corpus = artifacts.step_of(snapshot), _fingerprint(passages)
    folder = artifacts.step_folder(indexes, step)
    try:
      inputs = {"snapshot": snapshot, "passages": passages}
      if not artifacts.is_current(
        folder, kind=index.KIND, config=dataclasses.asdict(config), inputs=inputs
      ):
        with _announced(indexes, step):
          embed(folder, snapshot=snapshot, passages_folder=passages, config=config)
          artifacts.prune(indexes, newest=keep)
          ownership.tidy(indexes)
      return folder
    # Any error of reading a folder that is replaced or deleted meanwhile, here or in a worker.
    except Exception:
      if artifacts.is_complete(snapshot) and _fingerprint(passages) == corpus:
        raise
      changed = passages if artifacts.is_complete(snapshot) else snapshot
      print(f"{changed} was changed while being read; trying again.", flush=True)
  raise artifacts.ArtifactError(
    f"no complete snapshot under {snapshots!r}; wait for the trainer to publish one."
  )


@contextlib.contextmanager
def _announced(indexes: str, step: int) -> Iterator[None]:
  """Announces to the trainer that a refresh is under way, and keeps other jobs out."""
  other = refresh.under_way(indexes)
  # A local lock knows more than the file: whether a process of another container is still running.
  if other is not None and (paths.is_remote(indexes) or writers.is_this_process(other)):
    raise artifacts.ArtifactError(
      f"{writers.words(other)} is making an index in {indexes!r}. Wait for it, or stop it and "
      f"delete {refresh.STATUS}."
    )
  artifacts.gfile.makedirs(indexes)
  path = os.path.join(indexes, refresh.STATUS)
  with ownership.only_writer(indexes):
    writers.leave(path, {**writers.this_process(), "snapshot_step": step})
    try:
      yield
    finally:
      artifacts.gfile.remove(path)


def _fingerprint(passages: str) -> str | None:
  """Returns the fingerprint of a passages folder; None while it is being replaced."""
  info = ownership.own_info(passages)
  return info.get("fingerprint") if info else None


def watch(
  refresh_once: Callable[[], str], *, snapshots: str, passages: str, poll_secs: float
) -> None:
  """Refreshes for every newer snapshot and every update of the passages; never returns."""
  done = None
  while True:
    now = artifacts.latest(snapshots), _fingerprint(passages)
    if None not in now and now != done:
      done = artifacts.step_folder(snapshots, artifacts.step_of(refresh_once())), now[1]
    time.sleep(poll_secs)


def config_of(args: flags.FlagValues) -> IndexConfig:
  """Returns how to make an index.

  A trainer's job has only its flags. Otherwise the flags that are not given are as the newest index
  was made.
  """
  newest = None if args.parent_pid else artifacts.latest(args.indexes)
  info = ownership.own_info(newest) if newest else None  # it may be damaged, and is then made again
  made = None
  if info and info["kind"] == index.KIND and info["format_version"] == artifacts.FORMAT_VERSION:
    made = info["config"]
  config = index_flags.config_of(args, made)
  default = dataclasses.asdict(IndexConfig())
  kept = [f"--{name}={value}" for name, value in (made or {}).items() if value != default[name]]
  if kept and dataclasses.asdict(config) == made:
    print(f"refresh_index: as {newest} was made: {' '.join(kept)}", flush=True)
  return config


def _end_with(parent_pid: int) -> None:
  """Ends this process group once the process that started it is gone, even if it was killed."""
  while os.getppid() == parent_pid:
    time.sleep(0.5)
  os.killpg(0, signal.SIGKILL)


def main(argv: Sequence[str]) -> None:
  args = flags.FLAGS
  for device in tf.config.list_physical_devices("GPU"):
    tf.config.experimental.set_memory_growth(device, True)  # a trainer may share the device
  if args.parent_pid:
    threading.Thread(target=_end_with, args=[args.parent_pid], daemon=True).start()

  def refresh_once() -> str:
    return refresh_newest(
      snapshots=args.snapshots,
      passages=args.passages,
      indexes=args.indexes,
      keep=args.keep,
      config=config_of(args),
      embed=embed,
    )

  def embed(folder: str, **what) -> None:
    embedding.embed(
      folder, **what, batch_size=args.batch_size, jit_compile=args.jit_compile, beam_args=argv[1:]
    )

  if args.watch:
    watch(refresh_once, snapshots=args.snapshots, passages=args.passages, poll_secs=args.poll_secs)
  else:
    refresh_once()

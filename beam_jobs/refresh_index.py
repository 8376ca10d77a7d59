"""Makes the index of the newest snapshot, once or for ever. REALM, section 3.3: the refresh that training never waits for.

    python -m beam_jobs.refresh_index --snapshots=W/snapshots --passages=P --indexes=W/indexes                # once
    python -m beam_jobs.refresh_index --snapshots=W/snapshots --passages=P --indexes=W/indexes --watch        # beside a trainer

Watching, it always takes the newest snapshot, passing over those that came and went meanwhile, and keeps the compiled tower
from one refresh to the next. Beam's options follow `--`.
"""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import tensorflow as tf
from absl import flags

from beam_jobs import embed_passages, pipelines
from realm_tf import artifacts, index, ownership, refresh
from realm_tf.index import IndexConfig


def refresh_newest(*, snapshots: str, passages: str, indexes: str, config: IndexConfig, keep: int, embed: Callable) -> str:
  """Publishes the newest snapshot's index, unless it is there.

  Args:
    snapshots, indexes: roots of numbered folders.
    passages: folder.
    keep: how many indexes to leave.
    embed: `embed_passages.embed` with the settings that stay the same.

  Returns:
    The index folder.

  Raises:
    ArtifactError: no snapshot is there, another process makes an index in this folder, or what `embed` raises.
  """
  while (snapshot := artifacts.latest(snapshots)) is not None:
    step = artifacts.step_of(snapshot)
    folder = artifacts.step_folder(indexes, step)
    try:
      inputs = {"snapshot": snapshot, "passages": passages}
      if not artifacts.is_current(folder, kind=index.KIND, config=dataclasses.asdict(config), inputs=inputs):
        with _announced(indexes, step):
          embed(folder, snapshot=snapshot, passages_folder=passages, config=config)
          artifacts.prune(indexes, newest=keep)
          ownership.tidy(indexes)
      return folder
    except Exception:  # whatever reading a folder raises that the trainer deletes meanwhile, here or in a worker
      if artifacts.is_complete(snapshot):
        raise
      print(f"{snapshot} was deleted while it was read; taking the newest.", flush=True)
  raise artifacts.ArtifactError(f"no complete snapshot under {snapshots!r}: a trainer publishes them there.")


@contextlib.contextmanager
def _announced(indexes: str, step: int) -> Iterator[None]:
  """Tells the trainer that a refresh is under way, and keeps a second job out."""
  if (other := refresh.under_way(indexes)) is not None:
    raise artifacts.ArtifactError(
        f"process {other['pid']} on {other['host']} makes an index in {indexes!r} since {time.ctime(other['started'])}. Wait "
        f"for it, or stop it and delete {refresh.STATUS}.")
  artifacts.gfile.makedirs(indexes)
  path = os.path.join(indexes, refresh.STATUS)
  artifacts.write_text(path, json.dumps(
      {"snapshot_step": step, "started": time.time(), "pid": os.getpid(), "host": socket.gethostname()}))
  try:
    yield
  finally:
    artifacts.gfile.remove(path)


def watch(refresh_once: Callable[[], str], *, snapshots: str, poll_secs: float) -> None:
  """Refreshes for every newer snapshot, for ever."""
  done = None
  while True:
    if artifacts.latest(snapshots) != done:
      done = artifacts.step_folder(snapshots, artifacts.step_of(refresh_once()))
    time.sleep(poll_secs)


def _end_with(parent_pid: int) -> None:
  """Ends this process group once the process that started it is gone, even when that was killed."""
  while os.getppid() == parent_pid:
    time.sleep(0.5)
  os.killpg(0, signal.SIGKILL)


def main(argv: Sequence[str]) -> None:
  args = flags.FLAGS
  for device in tf.config.list_physical_devices("GPU"):
    tf.config.experimental.set_memory_growth(device, True)  # a trainer may be on the same one
  if args.parent_pid:
    threading.Thread(target=_end_with, args=[args.parent_pid], daemon=True).start()

  def refresh_once() -> str:
    return refresh_newest(
        snapshots=args.snapshots, passages=args.passages, indexes=args.indexes, keep=args.keep,
        config=embed_passages.index_config(args), embed=embed)

  def embed(folder: str, **what) -> None:
    embed_passages.embed(
      folder, **what, batch_size=args.batch_size, jit_compile=args.jit_compile, beam_args=argv[1:]
    )

  if args.watch:
    watch(refresh_once, snapshots=args.snapshots, poll_secs=args.poll_secs)
  else:
    refresh_once()


if __name__ == "__main__":
  flags.DEFINE_string("snapshots", None, "The root of a trainer's snapshots.", required=True)
  flags.DEFINE_string("passages", None, "The passages folder.", required=True)
  flags.DEFINE_string("indexes", None, "The root of the indexes to write.", required=True)
  embed_passages.define_flags()
  flags.DEFINE_bool("watch", False, "Go on with every newer snapshot.")
  flags.DEFINE_float("poll_secs", 1.0, "Pause between two looks for a newer snapshot.")
  flags.DEFINE_integer("keep", 2, "How many indexes to keep.", lower_bound=1)
  flags.DEFINE_integer("parent_pid", None, "The process that started this one (realm_tf.refresh); this one ends with it.")
  pipelines.start("beam_jobs.refresh_index")

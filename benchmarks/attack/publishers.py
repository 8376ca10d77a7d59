"""Kills and races of processes that publish one artifact; see kills.py."""

import functools
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable

from realm_tf.storage import artifacts, integrity, publishing


def publish(folder: str, text: str, *, pause_secs: float = 0.0) -> None:
  """Publishes an artifact of three files that hold the same text."""
  with publishing.publish(folder, kind="things", config={"text": text}, inputs={}) as staged:
    for name in ("a", "b", "c"):
      artifacts.write_text(os.path.join(staged.path, name), text)
      time.sleep(pause_secs)


def _in_a_child(work: Callable[[], None]) -> int:
  """Starts a function in a separate process, which shares only files with this one."""
  pid = os.fork()
  if pid == 0:
    code = 1
    try:
      work()
      code = 0
    except artifacts.ArtifactError as error:
      code = 3 if "another process is writing to" in str(error) else 1
      if code == 1:
        print(error, file=sys.stderr, flush=True)
    except Exception:
      traceback.print_exc()
    finally:
      os._exit(code)
  return pid


def _text_of(folder: str) -> str:
  """Returns the text in an artifact of `publish`; raises if it is a mixture."""
  integrity.check_digests(folder)
  config = artifacts.read_info(folder)["config"]
  texts = {artifacts.read_text(os.path.join(folder, name)) for name in "abc"}
  if texts != {config["text"]}:
    raise artifacts.ArtifactError(f"{folder!r} holds {texts}, but its config {config['text']!r}.")
  return config["text"]


def kill(root: str, *, kills: int, rng: random.Random) -> list[str]:
  """Kills processes that publish over an artifact; returns descriptions of what went wrong."""
  shutil.rmtree(root, ignore_errors=True)
  os.makedirs(root)
  folder, wrong = os.path.join(root, "A"), []
  publish(folder, "0")
  started = time.monotonic()
  publish(folder, "1")
  secs = time.monotonic() - started
  before = "1"
  for number in range(2, 2 + kills):
    text = str(number)
    child = _in_a_child(functools.partial(publish, folder, text))
    time.sleep(rng.uniform(0, 1.5 * secs))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    try:
      if artifacts.is_complete(folder) and _text_of(folder) not in (before, text):
        wrong.append(f"kill {number}: it holds {_text_of(folder)}")
      publish(folder, text)
      before = _text_of(folder)
      if before != text or os.listdir(root) != ["A"]:
        wrong.append(f"kill {number}: it holds {before}; there is {sorted(os.listdir(root))}")
    except artifacts.UserError as error:
      wrong.append(f"kill {number}: {error}")
  return wrong


def race(root: str, *, races: int, rng: random.Random) -> list[str]:
  """Publishes to one place from three processes at once; describes what went wrong."""
  shutil.rmtree(root, ignore_errors=True)
  os.makedirs(root)
  folder, wrong = os.path.join(root, "A"), []
  for number in range(races):
    texts = [f"{number} of {one}" for one in range(3)]
    pause_secs = rng.uniform(0, 0.003)
    children = [
      _in_a_child(functools.partial(publish, folder, text, pause_secs=pause_secs)) for text in texts
    ]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    try:
      if not set(codes) <= {0, 3} or 0 not in codes:
        wrong.append(f"race {number}: exit codes {codes}")
      if _text_of(folder) not in [
        text for text, code in zip(texts, codes, strict=True) if not code
      ]:
        wrong.append(f"race {number}: it holds {_text_of(folder)}, from a process that failed")
    except artifacts.UserError as error:
      wrong.append(f"race {number}: {error}")
    if os.listdir(root) != ["A"]:
      wrong.append(f"race {number}: there is {sorted(os.listdir(root))}")
  return wrong

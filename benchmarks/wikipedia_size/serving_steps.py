"""Exports and serves a large corpus, and adds passages to it."""

import contextlib
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import numpy as np

from benchmarks.wikipedia_size import measuring
from realm_tf.storage import artifacts, json_lines
from serving.remote import Client

MODEL, RETRIEVE = "realm", "retrieve"
CONFIG = ("searcher", "embedding_type", "recall")  # flags of the index's job
_START_SECS = 900
NEW = "Quillonian Weir"  # in no other text


def export(workdir: str, passages: str, index: str, output: str) -> dict:
  """Exports a system with the large corpus and its index."""
  gib = measuring.command(
    "serving.export",
    f"--workdir={workdir}",
    f"--passages={passages}",
    f"--index={index}",
    f"--output={output}",
    f"--searcher={artifacts.read_info(index)['config']['searcher']}",
  )
  version = max(filter(str.isdigit, os.listdir(output)), key=int)
  sizes = [
    os.path.getsize(os.path.join(folder, name))
    for folder, _, names in os.walk(os.path.join(output, version))
    for name in names
  ]
  return {"command's GiB": round(gib, 2), "GiB on disk": round(sum(sizes) / 2**30, 1)}


@contextlib.contextmanager
def _server(output: str) -> Iterator[tuple[Client, measuring.Peak, float]]:
  """Runs a model server; yields a client when the server answers, its memory and its start-up."""
  with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
  started = time.monotonic()
  process = subprocess.Popen(
    [
      sys.executable,
      "-m",
      "serving.model_server",
      f"--port={port}",
      f"--model_name={MODEL}",
      f"--model_base_path={os.path.abspath(output)}",
    ]
  )
  try:
    with measuring.Peak(process.pid) as peak:
      stub = Client(f"localhost:{port}", model_name=MODEL, timeout_secs=_START_SECS)
      _retrieve(stub, "is it there")  # waits until it is
      yield stub, peak, time.monotonic() - started
  finally:
    process.terminate()
    process.wait()


def _retrieve(stub: Client, question: str) -> list[str]:
  """Returns the titles of the passages that a server finds, best first."""
  found = stub.predict(RETRIEVE, {"question": [question]})
  return found["title"][0].tolist()


def serve(output: str, questions: str, num: int) -> dict:
  """Answers questions over gRPC, one after another."""
  with open(questions, "rb") as file:
    texts = [record.row["question"] for record in json_lines.read(file) if record.row]
  texts = list(itertools.islice(itertools.cycle(texts), num))
  with _server(output) as (stub, peak, start_secs):
    secs = []
    for text in texts:
      started = time.perf_counter()
      titles = _retrieve(stub, text)
      secs.append(time.perf_counter() - started)
      assert any(titles), f"no passage for {text!r}"
  p50, p99 = (round(1e3 * float(part), 1) for part in np.percentile(secs, [50, 99]))
  return {
    "started in s": round(start_secs, 1),
    "server's GiB": round(peak.gib, 2),
    "answered": len(secs),
    "p50 ms": p50,
    "p99 ms": p99,
  }


def _new_articles(path: str, num: int) -> None:
  """Writes short articles, of which one has a name that no other text has."""
  with open(path, "w") as file:
    for number in range(num):
      name = NEW if number == num // 2 else f"Weir {number}"
      text = f"{name} is weir number {number} of the upper valley, finished in {1500 + number}."
      file.write(json.dumps({"title": name, "text": text}) + "\n")


def _modified(folder: str, names: Sequence[str]) -> dict[str, tuple[int, int]]:
  stats = {name: os.stat(os.path.join(folder, name)) for name in names}
  return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def update(
  workdir: str,
  passages: str,
  snapshot: str,
  index: str,
  output: str,
  num: int,
) -> dict:
  """Adds passages, embeds and exports them, and asks a server about one of them."""
  folder = os.path.dirname(passages)
  articles = os.path.join(folder, "new.jsonl")
  _new_articles(articles, num)
  before = {
    place: _modified(place, [name for name in artifacts.read_info(place)["files"]])
    for place in (passages, index)
  }
  config = artifacts.read_info(index)["config"]
  found: dict[str, object] = {}
  started = time.monotonic()

  def took(name: str) -> None:
    found[f"{name} after s"] = round(time.monotonic() - started, 1)

  measuring.command("beam_jobs.update_passages", f"--passages={passages}", f"--add={articles}")
  took("passages added")
  measuring.command(
    "beam_jobs.embed_passages",
    f"--snapshot={snapshot}",
    f"--passages={passages}",
    f"--output={index}",
    *(f"--{name}={config[name]}" for name in CONFIG),
    "--nojit_compile",
  )
  took("embedded")
  export(workdir, passages, index, output)
  took("exported")
  versions = sorted(filter(str.isdigit, os.listdir(output)), key=int)
  for version in versions[:-1]:  # two of them do not fit into memory
    shutil.rmtree(os.path.join(output, version))
  with _server(output) as (stub, _, _):
    titles = _retrieve(stub, f"In what year was {NEW} finished?")
  took("answered")
  found["rank of the new passage"] = titles.index(NEW) + 1 if NEW in titles else None
  touched = [
    f"{place}/{name}"
    for place, files in before.items()
    for name, stat in files.items()
    if name.endswith((".arrow", ".npy")) and _modified(place, [name])[name] != stat
  ]
  found["other files touched"] = len(touched)
  return found

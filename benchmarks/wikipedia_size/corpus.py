"""Writes a large corpus: the passages of a small one, again and again."""

import concurrent.futures
import dataclasses
import os
import shutil
import time

import numpy as np
import pyarrow as pa

from realm_tf.corpus import passages
from realm_tf.corpus.segments import Sizes
from realm_tf.corpus.vocabularies import VOCAB
from realm_tf.storage import artifacts, integrity, publishing

SIZES = Sizes()


def cut(num_rows: int, start: int, size: int) -> list[tuple[int, int]]:
  """Returns the ranges of a table that rows [start, start + size) of its endless repetition are."""
  ranges = []
  while size:
    first = start % num_rows
    taken = min(size, num_rows - first)
    ranges.append((first, taken))
    start, size = start + taken, size - taken
  return ranges


def _rows(source: pa.Table, start: int, size: int) -> pa.Table:
  """Returns rows of the large corpus; the copies of a passage are passages of other documents."""
  parts = [source.slice(first, taken) for first, taken in cut(len(source), start, size)]
  table = pa.concat_tables(parts).combine_chunks()
  numbers = np.arange(start, start + size)
  copies = numbers // len(source)
  uids = np.frombuffer(b"".join(table["uid"].to_pylist()), np.uint8).reshape(size, -1).copy()
  uids[:, :4] ^= copies.astype(">u4").view(np.uint8).reshape(size, 4)
  documents = [
    f"{name} ({copy})" if copy else name
    for name, copy in zip(table["document"].to_pylist(), copies.tolist(), strict=True)
  ]
  columns = {
    "number": pa.array(numbers.astype(np.int32)),
    "document": pa.array(documents),
    "uid": pa.array([row.tobytes() for row in uids], table.schema.field("uid").type),
  }
  for name, column in columns.items():
    table = table.set_column(table.schema.get_field_index(name), name, column)
  fields = [pa.field(field.name, field.type, nullable=False) for field in table.schema]
  return table.cast(pa.schema(fields))


def write(source: str, folder: str, num_rows: int) -> dict:
  """Publishes a passages folder of `num_rows` passages, with the texts of `source`."""
  info = artifacts.read_info(source, kind=passages.KIND)
  tables = []
  for path in passages.shard_paths(source, passages.KIND):
    with pa.memory_map(path) as file:
      tables.append(pa.ipc.open_file(file).read_all())
  table = pa.concat_tables(tables, promote_options="permissive")
  with publishing.publish(
    folder, kind=passages.KIND, config={**info["config"], "repeated_to": num_rows}, inputs={}
  ) as staged:

    def write_one(shard: tuple[int, int, int]) -> tuple[str, dict]:
      segment, number, size = shard
      start = segment * SIZES.segment + number * SIZES.shard
      count = SIZES.num_shards(num_rows, segment)
      name = passages.shard_name(passages.KIND, number, count, segment=segment)
      rows, path = _rows(table, start, size), os.path.join(staged.path, name)
      with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, rows.schema) as writer:
        writer.write_table(rows)
      return name, integrity.describe(path, records=size)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
      files = dict(pool.map(write_one, SIZES.shards(num_rows)))
    shutil.copy(os.path.join(source, VOCAB), staged.path)
    staged.files = files
    staged.content = artifacts.fingerprint_of([file["sha256"] for file in files.values()])
    staged.counts = {"passages": num_rows, "articles": num_rows, "deleted": 0, "dropped": {}}
    tokenizer = passages.load_tokenizer(source)
    staged.details = {**tokenizer.details, "sizes": dataclasses.asdict(SIZES)}
  gib = sum(file["bytes"] for file in files.values()) / 2**30
  return {"GiB on disk": round(gib, 1)}


def open_corpus(folder: str) -> dict:
  """Opens a corpus as a trainer, an evaluation or a server does, and reads a few passages."""
  from benchmarks.wikipedia_size import measuring

  before, started = measuring.own_gib(), time.monotonic()
  table = passages.load(folder)
  secs = time.monotonic() - started
  for number in np.random.default_rng(0).integers(len(table), size=1000):
    assert len(table.text_ids[number]) and table.texts[number]
  return {"opened in s": round(secs, 2), "MiB": round(1024 * (measuring.own_gib() - before))}


def compact(folder: str) -> dict:
  """Deletes the documents of every hundredth passage, then drops their rows.

  A document is known by its id, or else by its title. Copies keep the title, so they are deleted
  too if the documents of the source are known by title.
  """
  from benchmarks.wikipedia_size import measuring

  table, names = passages.load(folder), f"{folder}.deleted.txt"
  with open(names, "w") as file:
    file.writelines(f"{table.documents[row]}\n" for row in range(0, len(table), 100))
  found: dict[str, object] = {"passages before": table.num_alive}
  del table
  for name, flag in (("delete", f"--delete={names}"), ("compact", "--compact")):
    started = time.monotonic()
    gib = measuring.command("beam_jobs.update_passages", f"--passages={folder}", flag)
    found |= {f"{name} in s": round(time.monotonic() - started, 1), f"{name}'s GiB": round(gib, 2)}
  return {**found, "passages": len(passages.load(folder))}

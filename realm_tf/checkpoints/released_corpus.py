"""Converts the text of a released corpus to passages."""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import tensorflow as tf

from realm_tf import progress
from realm_tf.checkpoints.tensor_files import CheckpointError
from realm_tf.corpus import passages, vocabularies
from realm_tf.corpus.segments import Sizes
from realm_tf.corpus.tokenization import Tokenizer
from realm_tf.storage import artifacts, publishing

SIZES = Sizes()  # of passages and embeddings


@contextlib.contextmanager
def as_records(path: str) -> Iterator[str]:
  """Yields a TFRecord file with the passages of `path`, which may be a pickle."""
  if not path.endswith(".npy"):
    yield path
    return
  with tempfile.TemporaryDirectory() as scratch:
    records = os.path.join(scratch, "blocks.tfr")
    done = subprocess.run(
      [sys.executable, "-m", "realm_tf.block_records", f"--input={path}", f"--output={records}"],
      stderr=subprocess.PIPE,
      text=True,
      check=False,
    )
    if done.returncode:
      told = done.stderr.strip().splitlines()[-1:] or [f"it ended with {done.returncode}"]
      raise CheckpointError(told[0].removeprefix("CheckpointError: "))
    yield records


def write_passages(
  records: str, output: str, *, tokenizer: Tokenizer, num_passages: int, titles: str | None = None
) -> None:
  """Publishes the passages of a released corpus.

  Record i is the text of passage i, which counts as one sentence.

  Args:
    records: a TFRecord file of UTF-8 texts.
    output: the passages folder to write.
    tokenizer: tokenizer that makes the word pieces.
    num_passages: number of passages to write; further records are left out.
    titles: a TFRecord file of the titles; if None, passages have no titles.

  Raises:
    CheckpointError: if there are fewer than `num_passages` records.
  """
  config = {
    "blocks": artifacts.file_digest(records),
    "titles": artifacts.file_digest(titles) if titles else None,
    "vocab": tokenizer.fingerprint,
    "passages": num_passages,
  }
  if artifacts.is_current(output, kind=passages.KIND, config=config, inputs={}):
    return
  texts = tf.data.TFRecordDataset(records)
  titled = tf.data.Dataset.zip(
    tf.data.TFRecordDataset(titles) if titles else texts.map(lambda text: ""), texts
  )
  rate = progress.Rate("passages", num_passages)
  rows = titled.take(num_passages).batch(SIZES.shard).as_numpy_iterator()
  with publishing.publish(
    output, kind=passages.KIND, config=config, inputs={}, resume=True
  ) as staged:
    found = bad = 0
    for (segment, shard, _), columns in zip(SIZES.shards(num_passages), rows, strict=False):
      num_shards = SIZES.num_shards(num_passages, segment)
      name = passages.shard_name(passages.KIND, shard, num_shards, segment=segment)
      path = os.path.join(staged.path, name)
      batch = list(zip(*columns, strict=True))
      blocks = [
        (title.decode(errors="replace"), [text.decode(errors="replace")]) for title, text in batch
      ]
      if not artifacts.gfile.exists(path):
        made = passages.make_passages(tokenizer, blocks, range(found, found + len(batch)))
        passages.write_shard(path, made, passages.Passage)
      found += len(batch)
      bad += sum(
        (title.encode(), text.encode()) != record
        for (title, (text,)), record in zip(blocks, batch, strict=True)
      )
      rate.add(len(batch))
    if found < num_passages:
      files = [path for path in (records, titles) if path]
      hold = "hold" if files[1:] else "holds"
      raise CheckpointError(
        f"{' and '.join(map(repr, files))} {hold} {found} passages, but the checkpoint has "
        f"embeddings of {num_passages}: they do not belong together."
      )
    vocabularies.write(staged.path, tokenizer.pieces)
    # Passages with bad UTF-8 are kept, with U+FFFD, because passage i is row i.
    staged.counts = {
      "passages": num_passages,
      "bad_utf8": bad,
    }
    staged.details = tokenizer.details

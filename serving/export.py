"""Exports a trained system as one SavedModel for TensorFlow Serving.

    python -m serving.export --workdir=W --output=M [--searcher=partitioned]

The graph contains the tokenizer, the search, the passages and the readers.

If W is a workdir of realm_tf.finetune, the model answers questions; it also fills blanks if the
pre-trained snapshot that W's index came from is found (or given as --pretrained). If W is a workdir
of realm_tf.pretrain, the model retrieves and fills blanks. --searcher=exact, the default, and
--searcher=partitioned need only the ops of TensorFlow and TensorFlow Text, so that the stock image
can serve them; --searcher=scann needs a server with ScaNN's op.

Each export is a new version M/1, M/2, .. It is written to M/.staging-N, which TensorFlow Serving
ignores because it is not a number, and renamed when complete, so `newest_version` and a server that
watches M only ever see complete versions. On object stores, where a rename is a copy, a server may
find a version too early; it then fails to load it and retries.

With --watch it keeps running, and exports whenever the snapshot, the index or the passages have
changed. Beside `beam_jobs.refresh_index --watch`, a server so gets every update of the passages.
Each version is as large as the corpus: --keep=2 deletes all but the newest two.
"""

import functools
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from realm_tf import cli
from realm_tf.retrieval.index_config import SEARCHERS

if __name__ == "__main__":
  flags.DEFINE_string(
    "workdir", None, "Workdir of realm_tf.finetune or realm_tf.pretrain.", required=True
  )
  flags.DEFINE_string("output", None, "Folder of versions, M.", required=True)
  flags.DEFINE_enum(
    "searcher",
    "exact",
    SEARCHERS,
    "The searcher; scann needs a server with ScaNN's op.",
  )
  flags.DEFINE_integer(
    "num_answers", 5, "Answers per question, and word pieces per blank.", lower_bound=1
  )
  flags.DEFINE_integer(
    "num_passages", None, "Passages to read; by default as many as in training.", lower_bound=1
  )
  flags.DEFINE_integer("num_retrieved", 100, "Passages to retrieve.", lower_bound=1)
  flags.DEFINE_integer(
    "num_candidates", 5, "Candidates per text, including the null passage.", lower_bound=2
  )
  flags.DEFINE_string(
    "pretrained",
    None,
    "Workdir of realm_tf.pretrain, for filling blanks; by default searched for next to W's index.",
  )
  flags.DEFINE_string("index", None, "Index to use instead of the workdir's.")
  flags.DEFINE_string("passages", None, "Passages to use instead of the workdir's.")
  flags.DEFINE_integer(
    "version", None, "Version to write; by default the next free one.", lower_bound=1
  )
  flags.DEFINE_integer(
    "keep",
    None,
    "How many versions to keep, older ones are deleted; by default all.",
    lower_bound=1,
  )
  flags.DEFINE_bool("watch", False, "Keep running, and export whenever the inputs have changed.")
  flags.DEFINE_float("poll_secs", 1.0, "With --watch, seconds between two checks.")
  cli.start("serving.export")

import numpy as np
import tensorflow as tf
from absl import logging
from tensorflow_serving.apis import predict_pb2, prediction_log_pb2

from realm_tf.corpus import passages
from realm_tf.corpus.passages import PassageTable
from realm_tf.corpus.tokenization import Tokenizer
from realm_tf.examples import packing
from realm_tf.models.retriever import Retriever
from realm_tf.retrieval import index
from realm_tf.storage import artifacts, ownership, publishing, saved_models
from realm_tf.systems.passage_retrieval import SERVED
from serving import parts, signatures
from serving.parts import System
from serving.servable import answering, mask_filling, retrieval

KIND = "servable"
SIGNATURES_JSON, SIGNATURES_MD = "signatures.json", "signatures.md"
EXTRA_ASSETS = "assets.extra"  # where TensorFlow Serving looks for warm-up requests
WARM_UP = "tf_serving_warmup_requests"
WARM_UP_BATCH_SIZES = (1, 32)

# ======================================================================================== the graph


def build(
  system: System,
  table: PassageTable,
  searcher: index.Searcher,
  *,
  num_answers: int,
  num_passages: int | None,
  num_retrieved: int,
  num_candidates: int,
) -> tuple[tf.Module, dict, dict[str, int]]:
  """Builds the graph of each signature.

  Args:
    system: the system to export.
    table: its passages.
    searcher: the searcher of its index.
    num_answers: N.
    num_passages: R; None reads as many as in training.
    num_retrieved: K, at most; fewer if the corpus has fewer.
    num_candidates: C.

  Returns:
    The module to save, its functions by signature name, and the sizes of `signatures.DIMENSIONS`
    that are fixed in it.

  Raises:
    UserError: more passages are to be read than retrieved, or there are more candidates than
      passages in the corpus.
  """
  tokenizer, module, functions = system.tokenizer, tf.Module(), {}
  sizes = {"N": num_answers, "K": min(num_retrieved, table.num_alive)}
  search = functools.partial(
    retrieval.Retrieval, retrieval.Corpus(table, tokenizer), searcher, tokenizer=tokenizer
  )
  reads = system.span_reader or system.retriever  # questions are packed as in its training
  module.retrieval = search(system.retriever.query_tower, query_length=reads.query_length)
  if system.span_reader:
    sizes["R"] = _num_read(num_passages, system, num_retrieved=sizes["K"])
    module.answering = answering.Answering(
      module.retrieval,
      system.span_reader,
      tokenizer=tokenizer,
      num_retrieved=sizes["K"],
      num_passages=sizes["R"],
      num_answers=num_answers,
    )
    functions[signatures.ANSWER.name] = module.answering.answer
  if system.masked_reader and system.pretrained:
    if num_candidates > table.num_alive + 1:
      raise artifacts.UserError(
        f"{num_candidates} candidates requested, but the corpus has {table.num_alive} passages; "
        "lower --num_candidates."
      )
    sizes["C"] = num_candidates
    module.mask_filling = mask_filling.MaskFilling(
      search(system.pretrained.query_tower, query_length=system.masked_reader.query_length),
      system.masked_reader,
      null_vector=null_vector(system.pretrained, tokenizer),
      tokenizer=tokenizer,
      num_candidates=num_candidates,
      num_answers=num_answers,
    )
    functions[signatures.FILL_MASK.name] = module.mask_filling.fill_mask
  functions[signatures.RETRIEVE.name] = lambda question: module.retrieval.retrieve(
    question, sizes["K"]
  )
  return module, {name: _function(name, function) for name, function in functions.items()}, sizes


def _num_read(wanted: int | None, system: System, *, num_retrieved: int) -> int:
  """Returns how many passages are read. Raises UserError if more are wanted than retrieved."""
  num = min(system.num_read, num_retrieved) if wanted is None else wanted
  if num > num_retrieved:
    raise artifacts.UserError(
      f"{num} passages to read, but only {num_retrieved} are retrieved; lower --num_passages."
    )
  return num


def _function(name: str, function):
  """Returns a function of a batch of strings, whose input has the name given by the signature."""
  (field,) = signatures.SIGNATURES[name].inputs
  text = tf.TensorSpec([None], tf.string, name=field.name)
  return tf.function(function, autograph=False, input_signature=[text])


def null_vector(retriever: Retriever, tokenizer: Tokenizer) -> np.ndarray:
  """Returns the embedding of the null passage: [D]."""
  nothing = tf.RaggedTensor.from_row_lengths(tf.zeros([0], tf.int32), [0])
  packed = packing.pack_passages(
    nothing, nothing, tokenizer=tokenizer, length=retriever.passage_length
  )
  return retriever.embed_passages(packed.token_ids, packed.segment_ids).numpy()[0]


# ======================================================================================= publishing


def complete_versions(output: str) -> list[str]:
  """Returns the folders of the complete versions under M, oldest first."""
  return [
    folder
    for version in versions(output)
    if artifacts.is_complete(folder := os.path.join(output, str(version)))
  ]


def newest_version(output: str) -> str | None:
  """Returns the folder of the newest complete version under M, or None."""
  complete = complete_versions(output)
  return complete[-1] if complete else None


def versions(output: str) -> list[int]:
  """Returns the versions that a server would find under M, oldest first."""
  names = artifacts.gfile.listdir(output) if artifacts.gfile.isdir(output) else []
  return sorted(int(name.rstrip("/")) for name in names if name.rstrip("/").isdigit())


def write_warm_up(path: str, names: Sequence[str], texts: Sequence[str]) -> None:
  """Writes requests that a server runs before it uses a model, so that first calls are not slow.

  Args:
    path: the record file to write.
    names: the signatures to call.
    texts: the inputs, repeated as needed.
  """
  with tf.io.TFRecordWriter(path) as writer:
    for name in names:
      (field,) = signatures.SIGNATURES.get(name, signatures.ANSWER).inputs
      blank = f" {signatures.MASK}" if name == signatures.FILL_MASK.name else ""
      for size in WARM_UP_BATCH_SIZES:
        request = predict_pb2.PredictRequest()
        request.model_spec.name, request.model_spec.signature_name = signatures.MODEL_NAME, name
        request.inputs[field.name].CopyFrom(
          tf.make_tensor_proto([texts[row % len(texts)] + blank for row in range(size)])
        )
        log = prediction_log_pb2.PredictionLog(
          predict_log=prediction_log_pb2.PredictLog(request=request)
        )
        writer.write(log.SerializeToString())


def export(
  workdir: str,
  output: str,
  *,
  searcher: str = "exact",
  num_answers: int = 5,
  num_passages: int | None = None,
  num_retrieved: int = SERVED,
  num_candidates: int = 5,
  pretrained: str | None = None,
  index_folder: str | None = None,
  passages_folder: str | None = None,
  version: int | None = None,
) -> str:
  """Publishes a new version of a servable; the arguments are the flags of the command.

  Returns:
    The folder of the version, M/<version>.

  Raises:
    ArtifactError: parts are missing or do not belong together.
    UserError: the version exists already, or the corpus is too small.
  """
  there = versions(output)
  version = version or max(there, default=0) + 1
  if version in there:
    raise artifacts.UserError(
      f"{output!r} already has a version {version}, and servers do not load a version twice; leave "
      "--version out."
    )
  folder = os.path.join(output, str(version))
  ownership.check_output(folder, kind=KIND, reads=[os.path.join(workdir, "snapshots")])
  system = parts.find_system(
    workdir, pretrained=pretrained, index_folder=index_folder, passages_folder=passages_folder
  )
  sizes: dict[str, Any] = {
    "num_answers": num_answers,
    "num_passages": num_passages,
    "num_retrieved": num_retrieved,
    "num_candidates": num_candidates,
  }
  with publishing.publish(
    folder, kind=KIND, config={"searcher": searcher, **sizes}, inputs=system.folders
  ) as staged:
    table = passages.load(system.folders["passages"])
    opened = parts.open_searcher(system, table, kind=searcher)
    module, functions, fixed = build(system, table, opened, **sizes)
    served = dict(functions)
    if signatures.ANSWER.name in served:
      served[signatures.DEFAULT] = served[signatures.ANSWER.name]
    saved_models.save(
      module,
      staged.path,
      signatures=served,
      options=tf.saved_model.SaveOptions(
        namespace_whitelist=["Scann"] if searcher == "scann" else None
      ),
    )
    titles = table.titles[: max(WARM_UP_BATCH_SIZES)]
    _write_assets(staged.path, functions, fixed, names=list(served), texts=titles)
    staged.counts = {"passages": table.num_alive}
    staged.details = {
      "signatures": list(served),
      "sizes": fixed,
      "vocab_fingerprint": system.tokenizer.fingerprint,
      "search": opened.describe(fixed["K"]),
    }
  return folder


def _write_assets(
  folder: str,
  functions: Mapping,
  sizes: Mapping[str, int],
  *,
  names: Sequence[str],
  texts: Sequence[str],
) -> None:
  """Writes the warm-up requests, and the description of the signatures.

  Args:
    folder: the SavedModel.
    functions: functions by signature name.
    sizes: the sizes of `signatures.DIMENSIONS` that are fixed.
    names: the signatures to warm up.
    texts: the inputs of warm-up requests.
  """
  extra = os.path.join(folder, EXTRA_ASSETS)
  artifacts.gfile.makedirs(extra)
  write_warm_up(os.path.join(extra, WARM_UP), names, texts)
  described = json.dumps(signatures.as_json(functions, sizes), indent=2) + "\n"
  for place in (folder, extra):
    artifacts.write_text(os.path.join(place, SIGNATURES_MD), signatures.markdown(functions, sizes))
    artifacts.write_text(os.path.join(place, SIGNATURES_JSON), described)


def watch(
  workdir: str,
  output: str,
  *,
  settings: Mapping,
  where: Mapping[str, Any],
  keep: int | None,
  poll_secs: float,
) -> None:
  """Exports whenever the newest version is not of the system as it is now; never returns.

  Args:
    workdir: see `export`.
    output: see `export`.
    settings: the searcher and the sizes; see `export`.
    where: the other parts; see `find_parts`.
    keep: how many versions to keep; None keeps all.
    poll_secs: seconds between two checks.
  """
  told = ""
  while True:
    try:
      _, _, folders = parts.find_parts(workdir, **where)
      now = {name: artifacts.read_info(folder)["fingerprint"] for name, folder in folders.items()}
      if (dict(settings), now) != _made_from(output):
        _end(export(workdir, output, **settings, **where), keep)
    except artifacts.ArtifactError as error:  # for example while the index is made
      if str(error) != told:
        print(f"waiting: {error}", file=sys.stderr, flush=True)
      told = str(error)
    time.sleep(poll_secs)


def _made_from(output: str) -> tuple[dict, dict[str, str]] | None:
  """Returns the settings of the newest version and the fingerprints of its inputs, if any."""
  folder = newest_version(output)
  if folder is None:
    return None
  info = artifacts.read_info(folder)
  return info["config"], {name: part["fingerprint"] for name, part in info["inputs"].items()}


def _end(folder: str, keep: int | None) -> None:
  """Prints what a new version has, and deletes all but the newest `keep` versions."""
  print(f"{folder}: {', '.join(artifacts.read_info(folder)['signatures'])}", flush=True)
  if keep:
    for older in complete_versions(os.path.dirname(folder))[:-keep]:
      if older != folder:  # --version may have been a lower one
        ownership.remove(older)
        print(f"{older}: deleted, because of --keep={keep}", flush=True)


def main(argv):
  del argv
  logging.set_verbosity(logging.WARNING)  # TensorFlow logs every step of saving
  args = flags.FLAGS
  settings = {
    "searcher": args.searcher,
    "num_answers": args.num_answers,
    "num_passages": args.num_passages,
    "num_retrieved": args.num_retrieved,
    "num_candidates": args.num_candidates,
  }
  where = {
    "pretrained": args.pretrained,
    "index_folder": args.index,
    "passages_folder": args.passages,
  }
  if not args.watch:
    _end(export(args.workdir, args.output, **settings, **where, version=args.version), args.keep)
  elif args.version:
    raise artifacts.UserError("--watch makes new versions by itself; leave --version out.")
  else:
    watch(
      args.workdir,
      args.output,
      settings=settings,
      where=where,
      keep=args.keep,
      poll_secs=args.poll_secs,
    )

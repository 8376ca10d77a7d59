"""Exports a trained system as one SavedModel for TensorFlow Serving: tokeniser, search, passages and readers in its graph.

    python -m serving.export --workdir=W --output=M [--searcher=scann]

W is the workdir of realm_tf.finetune: the model answers questions, and where the pre-trained snapshot that W's index came from
is at hand (or given as --pretrained), it also fills blanks. A workdir of realm_tf.pretrain retrieves and fills blanks. --searcher=exact, the default, needs no op
beyond TensorFlow's and TensorFlow Text's, so that the stock image serves it; --searcher=scann needs a server with ScaNN's op.

Each export is a new version M/1, M/2, .. It is written as M/.staging-N, which TensorFlow Serving passes over because that is
no number, and renamed when it is complete, so `newest_version` and a server that watches M only ever see complete ones. On
object stores, where a rename is a copy, a server that comes too early fails to load and tries again.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence

import numpy as np
import tensorflow as tf
from absl import flags, logging
from tensorflow_serving.apis import predict_pb2, prediction_log_pb2

from realm_tf import (
    artifacts, evaluate, examples, index, ownership, passages, retrieval, settings, snapshots)
from realm_tf.models.masked_reader import MaskedReader
from realm_tf.models.retriever import Retriever
from realm_tf.models.span_reader import SpanReader
from realm_tf.passages import PassageTable
from realm_tf.tokenization import Tokenizer
from serving import graph, signatures

KIND = "servable"
SIGNATURES_JSON, SIGNATURES_MD = "signatures.json", "signatures.md"
EXTRA_ASSETS = "assets.extra"  # where TensorFlow Serving looks for warm-up requests
WARM_UP = "tf_serving_warmup_requests"
WARM_UP_BATCH_SIZES = (1, 32)

_TRAIN_FIRST = "give the workdir of realm_tf.finetune or realm_tf.pretrain that has finished."


@dataclasses.dataclass(frozen=True)
class System:
  """What is exported: models with the passages and the index that belong to them.

  Attributes:
    folders: inputs by name: snapshot, index, passages and, where there is one, pretrained.
    retriever: its query tower embeds questions.
    span_reader: reads answers; None for a pre-trained system.
    num_read: passages that it was trained to read.
    pretrained: its query tower embeds texts with blanks; None where nothing fills them.
    masked_reader: fills blanks, or None.
  """

  folders: dict[str, str]
  tokenizer: Tokenizer
  retriever: Retriever
  span_reader: SpanReader | None
  num_read: int | None
  pretrained: Retriever | None
  masked_reader: MaskedReader | None


# ========================================================================================================== what belongs


def find_system(workdir: str, *, pretrained: str | None = None, index_folder: str | None = None,
                passages_folder: str | None = None) -> System:
  """Finds the parts of a trained system and checks that they belong together.

  Args:
    workdir: of realm_tf.finetune or realm_tf.pretrain.
    pretrained: the workdir of realm_tf.pretrain that a fine-tuned one's index comes from; None looks beside that index.
    index_folder, passages_folder: instead of those that it was trained with.

  Raises:
    ArtifactError: missing parts, or parts that do not belong together.
    UserError: a baseline, which has no retriever to serve.
  """
  snapshot = snapshots.newest(workdir, advice=_TRAIN_FIRST)
  info = artifacts.read_info(snapshot)
  fine_tuned = "retrieval" in info
  if fine_tuned and info["retrieval"] != "dense":
    raise artifacts.UserError(
        f"{workdir!r} is a baseline (finetune.retrieval={info['retrieval']}); export one with finetune.retrieval=dense.")
  if fine_tuned:
    made_with = None if index_folder and pretrained else _index_if_found(workdir, snapshot, must_exist=not index_folder)
    index_folder = index_folder or made_with
    passages_folder = passages_folder or artifacts.find_input(snapshot, "passages")
    evaluate.check_index_snapshot(index_folder, (info["index_snapshot"], info["fingerprint"]))
    beside = pretrained or os.path.dirname(os.path.dirname((made_with or index_folder).rstrip("/")))
    with_masks = _pretrained_snapshot(beside, info["index_snapshot"], must_exist=pretrained is not None)
  else:
    index_folder = index_folder or index.folder_of(workdir, snapshot)
    passages_folder = passages_folder or index.passages_of(index_folder)
    artifacts.check_input(index_folder, "snapshot", snapshot)
    with_masks = snapshot if "reader" in info["config"] else None
  artifacts.check_input(index_folder, "passages", passages_folder)
  tokenizer = snapshots.load_tokenizer(snapshot)
  examples.check_vocabulary(artifacts.read_info(passages_folder), passages_folder, tokenizer)
  folders = {"snapshot": snapshot, "index": index_folder, "passages": passages_folder}
  return System(
      folders=folders | ({"pretrained": with_masks} if with_masks else {}), tokenizer=tokenizer,
      retriever=snapshots.load_retriever(snapshot),
      span_reader=snapshots.load_model(snapshot, "reader") if fine_tuned else None, num_read=info.get("num_read"),
      pretrained=snapshots.load_retriever(with_masks) if with_masks else None,
      masked_reader=snapshots.load_model(with_masks, "reader") if with_masks else None)


def _index_if_found(workdir: str, snapshot: str, *, must_exist: bool) -> str | None:
  """The index that a snapshot was fine-tuned with."""
  try:
    return index.of_snapshot(workdir, snapshot)
  except artifacts.ArtifactError:
    if must_exist:
      raise
    return None


def _pretrained_snapshot(workdir: str, fingerprint: str, *, must_exist: bool) -> str | None:
  """The snapshot in a pre-trained workdir that the index was made from, where it has a masked reader."""
  folders = artifacts.complete_folders(os.path.join(workdir, "snapshots"))
  got = {artifacts.read_info(folder)["fingerprint"]: folder for folder in folders}
  if fingerprint in got and "reader" in artifacts.read_info(got[fingerprint])["config"]:
    return got[fingerprint]
  if must_exist:
    raise artifacts.ArtifactError(
        f"no snapshot {fingerprint} with a masked reader in {workdir!r} (there: {', '.join(got) or 'none'}); the fine-tuned "
        "index was made from it. Give the realm_tf.pretrain workdir that realm_tf.finetune started from.")
  return None


def open_searcher(
  system: System, table: PassageTable, *, kind: str
) -> index.ExactSearcher | index.ScannSearcher:
  """The index's searcher. If the index was made for exact search, ScaNN is built here, for the default recall."""
  folder = system.folders["index"]
  info = artifacts.read_info(folder, kind=index.KIND)
  if kind == "exact" or "scann" in info:
    return index.load(folder, searcher=kind)
  config = index.IndexConfig(searcher=kind)
  queries = retrieval.sample_queries(
    system.retriever, table, tokenizer=system.tokenizer, config=config
  )
  searcher = index.ScannSearcher.build(
    index.read_embeddings(folder, num_rows=len(table)), config, queries
  )
  said = index.measured_recall({"config": dataclasses.asdict(config), "scann": searcher.settings})
  print(f"{folder}: {said}", file=sys.stderr, flush=True)
  return searcher


# ============================================================================================================= the graph


def build(system: System, table: PassageTable, searcher: index.ExactSearcher | index.ScannSearcher, *, num_answers: int,
          num_passages: int | None, num_retrieved: int, num_candidates: int) -> tuple[tf.Module, dict, dict[str, int]]:
  """Makes the graph of each signature.

  Args:
    num_answers: N.
    num_passages: R; None reads as many as in training.
    num_retrieved: K, at most; fewer where the corpus has fewer.
    num_candidates: C.

  Returns:
    The module to save, its functions by signature name, and the sizes of `signatures.DIMENSIONS` that are fixed in it.

  Raises:
    UserError: more passages to read than are retrieved, or more candidates than the corpus has.
  """
  sizes = {"N": num_answers, "K": min(num_retrieved, len(table))}
  tokenizer, module, functions = system.tokenizer, tf.Module(), {}
  corpus = graph.Corpus(table)
  reads = system.span_reader or system.retriever  # packs questions as it was trained to
  module.retrieval = graph.Retrieval(corpus, searcher, system.retriever.query_tower, tokenizer=tokenizer,
                                     query_length=reads.query_length)
  if system.span_reader:
    sizes["R"] = min(system.num_read, sizes["K"]) if num_passages is None else num_passages
    if sizes["R"] > sizes["K"]:
      raise artifacts.UserError(f"{sizes['R']} passages to read, {sizes['K']} are retrieved; lower --num_passages.")
    module.answering = graph.Answering(module.retrieval, system.span_reader, tokenizer=tokenizer, num_retrieved=sizes["K"],
                                       num_passages=sizes["R"], num_answers=num_answers)
    functions[signatures.ANSWER.name] = module.answering.answer
  if system.masked_reader:
    if num_candidates > len(table) + 1:
      raise artifacts.UserError(
          f"{num_candidates} candidates asked for, the corpus has {len(table)} passages; lower --num_candidates.")
    sizes["C"] = num_candidates
    for_blanks = graph.Retrieval(
      corpus,
      searcher,
      system.pretrained.query_tower,
      tokenizer=tokenizer,
      query_length=system.masked_reader.query_length,
    )
    module.mask_filling = graph.MaskFilling(
      for_blanks,
      system.masked_reader,
      null_vector=null_vector(system.pretrained, tokenizer),
      tokenizer=tokenizer,
      num_candidates=num_candidates,
      num_answers=num_answers,
    )
    functions[signatures.FILL_MASK.name] = module.mask_filling.fill_mask
  functions[signatures.RETRIEVE.name] = lambda question: module.retrieval.retrieve(question, sizes["K"])
  return module, {name: _function(name, function) for name, function in functions.items()}, sizes


def _function(name: str, function):
  """A function of one batch of strings, its input named as the signature says."""
  field, = signatures.SIGNATURES[name].inputs
  return tf.function(function, input_signature=[tf.TensorSpec([None], tf.string, name=field.name)])


def null_vector(retriever: Retriever, tokenizer: Tokenizer) -> np.ndarray:
  """Embedding of the null passage: [D]."""
  nothing = tf.RaggedTensor.from_row_lengths(tf.zeros([0], tf.int32), [0])
  packed = examples.pack_passages(nothing, nothing, tokenizer=tokenizer, length=retriever.passage_length)
  return retriever.embed_passages(packed.token_ids, packed.segment_ids).numpy()[0]


# ============================================================================================================ publishing


def newest_version(output: str) -> str | None:
  """The folder of the newest complete version under M, or None."""
  complete = [folder for version in versions(output) if artifacts.is_complete(folder := os.path.join(output, str(version)))]
  return complete[-1] if complete else None


def versions(output: str) -> list[int]:
  """The versions that a server would find under M, oldest first."""
  names = artifacts.gfile.listdir(output) if artifacts.gfile.isdir(output) else []
  return sorted(int(name.rstrip("/")) for name in names if name.rstrip("/").isdigit())


def write_warm_up(path: str, names: Sequence[str], texts: Sequence[str]) -> None:
  """Writes requests of each signature that a server runs before it takes a model into use: nobody waits for first calls.

  Args:
    texts: to ask about, repeated as needed.
  """
  with tf.io.TFRecordWriter(path) as writer:
    for name in names:
      field, = signatures.SIGNATURES.get(name, signatures.ANSWER).inputs
      blank = f" {signatures.MASK}" if name == signatures.FILL_MASK.name else ""
      for size in WARM_UP_BATCH_SIZES:
        request = predict_pb2.PredictRequest()
        request.model_spec.name, request.model_spec.signature_name = signatures.MODEL_NAME, name
        request.inputs[field.name].CopyFrom(tf.make_tensor_proto([texts[row % len(texts)] + blank for row in range(size)]))
        log = prediction_log_pb2.PredictionLog(predict_log=prediction_log_pb2.PredictLog(request=request))
        writer.write(log.SerializeToString())


def export(workdir: str, output: str, *, searcher: str = "exact", num_answers: int = 5, num_passages: int | None = None,
           num_retrieved: int = evaluate.SERVED, num_candidates: int = 5, pretrained: str | None = None,
           index_folder: str | None = None, passages_folder: str | None = None, version: int | None = None) -> str:
  """Publishes a new version of a servable; the arguments are the command's flags.

  Returns:
    Its folder, M/<version>.

  Raises:
    ArtifactError: missing parts, or parts that do not belong together.
    UserError: the version is there already, or the corpus is too small.
  """
  there = versions(output)
  version = version or max(there, default=0) + 1
  if version in there:
    raise artifacts.UserError(
        f"{output!r} has a version {version}, and servers do not load a version twice; leave --version out.")
  folder = os.path.join(output, str(version))
  ownership.check_output(folder, kind=KIND, reads=[os.path.join(workdir, "snapshots")])
  system = find_system(workdir, pretrained=pretrained, index_folder=index_folder, passages_folder=passages_folder)
  sizes = {"num_answers": num_answers, "num_passages": num_passages, "num_retrieved": num_retrieved,
           "num_candidates": num_candidates}
  with artifacts.publish(folder, kind=KIND, config={"searcher": searcher, **sizes}, inputs=system.folders) as staged:
    table = passages.load(system.folders["passages"])
    opened = open_searcher(system, table, kind=searcher)
    module, functions, fixed = build(system, table, opened, **sizes)
    served = dict(functions)
    if signatures.ANSWER.name in served:
      served[signatures.DEFAULT] = served[signatures.ANSWER.name]
    tf.saved_model.save(module, staged.path, signatures=served,
                        options=tf.saved_model.SaveOptions(namespace_whitelist=["Scann"] if searcher == "scann" else None))
    extra = os.path.join(staged.path, EXTRA_ASSETS)
    artifacts.gfile.makedirs(extra)
    write_warm_up(os.path.join(extra, WARM_UP), list(served), table.titles[:max(WARM_UP_BATCH_SIZES)])
    described = json.dumps(signatures.as_json(functions, fixed), indent=2) + "\n"
    for place in (staged.path, extra):
      artifacts.write_text(os.path.join(place, SIGNATURES_MD), signatures.markdown(functions, fixed))
      artifacts.write_text(os.path.join(place, SIGNATURES_JSON), described)
    staged.counts = {"passages": len(table)}
    staged.details = {
      "signatures": list(served),
      "sizes": fixed,
      "vocab_fingerprint": system.tokenizer.fingerprint,
      "search": opened.describe(fixed["K"]),
    }
  return folder


def main(argv):
  del argv
  logging.set_verbosity(logging.WARNING)  # TensorFlow tells of every step of saving
  args = flags.FLAGS
  folder = export(
      args.workdir, args.output, searcher=args.searcher, num_answers=args.num_answers, num_passages=args.num_passages,
      num_retrieved=args.num_retrieved, num_candidates=args.num_candidates, pretrained=args.pretrained, index_folder=args.index,
      passages_folder=args.passages, version=args.version)
  print(f"{folder}: {', '.join(artifacts.read_info(folder)['signatures'])}")


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "Workdir of realm_tf.finetune or realm_tf.pretrain.", required=True)
  flags.DEFINE_string("output", None, "Folder of versions, M.", required=True)
  flags.DEFINE_enum("searcher", "exact", ("exact", "scann"), "exact: ops of TensorFlow and TensorFlow Text only.")
  flags.DEFINE_integer("num_answers", 5, "Answers to a question, and word pieces for a blank.", lower_bound=1)
  flags.DEFINE_integer("num_passages", None, "Passages to read; as many as in training by default.", lower_bound=1)
  flags.DEFINE_integer("num_retrieved", evaluate.SERVED, "Passages to retrieve.", lower_bound=1)
  flags.DEFINE_integer("num_candidates", 5, "Candidates for a blank, the null passage included.", lower_bound=2)
  flags.DEFINE_string("pretrained", None, "Workdir of realm_tf.pretrain, to fill blanks; by default looked for beside W's index.")
  flags.DEFINE_string("index", None, "Index instead of the workdir's own.")
  flags.DEFINE_string("passages", None, "Passages instead of the workdir's own.")
  flags.DEFINE_integer("version", None, "Version to write; the next free one by default.", lower_bound=1)
  settings.start(main)

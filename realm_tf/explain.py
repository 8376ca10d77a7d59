"""Looks inside one prediction: what was retrieved, what each passage is worth, and what they make of it together.

    python -m realm_tf.explain --workdir=W --text='The [MASK] of France is Paris.' --output=DIR
    python -m realm_tf.explain --workdir=W --text='The [MASK] of France is Paris.' --answer=capital --index=OLD --index=NEW
    python -m realm_tf.explain --workdir=W/finetune --question='who wrote hamlet'

W is a pre-trained workdir for --text, a fine-tuned one for --question. Of a text it shows REALM's Table 3: the filling y
(--answer, or the model's own), p(y|x) without retrieval, and for each candidate p(z|x), p(y|z,x), its retrieval utility and the
passage with y marked. Several indexes, made from several corpora with one snapshot, are its Table 4. --output also gets
explain.json and explain.html.
"""

import dataclasses
import itertools
import json
import os
import re
from collections.abc import Iterable, Sequence

import numpy as np
from absl import flags
from keras import ops
from rich.console import Console

from realm_tf import (
    answering, artifacts, evaluate, examples, explanations, index, passages, retrieval, settings,
    snapshots)
from realm_tf.examples import NULL_PASSAGE
from realm_tf.explanations import BLANK, Answer, Candidate, Explanation, Report
from realm_tf.passages import PassageTable, Ragged
from realm_tf.questions import Question
from realm_tf.tokenization import MASK, Tokenizer

_PUT_BACK = "Put them back, or make the index again with beam_jobs.embed_passages."
_NUM_ANSWERS = 3  # the best of every corpus, and of the null passage

# =============================================================================================== a text with [MASK]


@dataclasses.dataclass(frozen=True)
class BlankText:
  """A text with blanks.

  Attributes:
    segments: the text around the blanks.
    sizes: word pieces in each blank.
    pieces: y's word pieces, if y is given.
  """

  segments: Sequence[str]
  sizes: Sequence[int]
  pieces: tuple[int, ...] | None

  @classmethod
  def of(cls, text: str, answer: str | None, tokenizer: Tokenizer) -> "BlankText":
    """Finds the blanks; a single mask is widened to the answer.

    Raises:
      UserError: there is no mask, or the answer does not fit.
    """
    sizes, pieces = [blank.count(MASK) for blank in BLANK.findall(text)], None
    if not sizes:
      raise artifacts.UserError(f"the text has no {MASK}: {text!r}. Write {MASK} where a word is missing.")
    if answer is not None:
      pieces = tuple(tokenizer([answer]).to_list()[0])
      if not pieces or tokenizer.unk_id in pieces:
        words = " ".join(tokenizer.pieces[piece] for piece in pieces) or "nothing"
        raise artifacts.UserError(f"the answer {answer!r} is {words} in the snapshot's word pieces. Give one that they spell.")
      if sum(sizes) == 1:
        sizes = [len(pieces)]
      if sum(sizes) != len(pieces):
        raise artifacts.UserError(
            f"the answer {answer!r} has {len(pieces)} word pieces, the text {sum(sizes)} masks. Write one {MASK}, which is "
            "widened to the answer, or one for each word piece.")
    return cls(BLANK.split(text), sizes, pieces)

  def query(self, tokenizer: Tokenizer, *, query_length: int, max_masks: int) -> examples.MaskedQueries:
    """A batch of this one query, its targets still open.

    Raises:
      UserError: more masks or word pieces than the models take.
    """
    size, ids = sum(self.sizes), []
    for segment, masks in zip(tokenizer(self.segments).to_list(), [*self.sizes, 0]):
      ids += segment + [tokenizer.mask_id] * masks
    if size > max_masks:
      raise artifacts.UserError(f"{size} word pieces are masked, the snapshot's reader fills up to {max_masks}. Mask fewer.")
    if len(ids) > query_length - 2:
      raise artifacts.UserError(
          f"the text has {len(ids)} word pieces, the snapshot's queries have up to {query_length - 2}. Shorten it.")
    positions = np.zeros([1, max_masks], np.int32)
    positions[0, :size] = np.flatnonzero(np.array(ids) == tokenizer.mask_id) + 1  # [CLS] is 0
    return examples.MaskedQueries(
      ids=Ragged.of([ids], np.int32),
      mask_positions=positions,
      targets=np.zeros_like(positions),
      target_mask=(positions > 0).astype(np.float32),
      own_passages=np.array([[NULL_PASSAGE]], np.int32),
      holders=np.array([[NULL_PASSAGE]], np.int32),
    )

  def split(self, pieces: Sequence[int]) -> list[Sequence[int]]:
    """y's word pieces by blank."""
    return [pieces[end - size:end] for size, end in zip(self.sizes, itertools.accumulate(self.sizes))]

  def matches(self, sentence: str) -> bool:
    """Whether the sentence is this text with something in its blanks."""
    return re.fullmatch(".+?".join(map(re.escape, self.segments)), sentence) is not None


@dataclasses.dataclass(frozen=True)
class Reading:
  """What the models say of one text and its candidates.

  Attributes:
    scores: [C] f(x, z).
    log_probs: [C, M, V] float64 log p of every word piece at every mask.
  """

  scores: np.ndarray
  log_probs: np.ndarray

  @property
  def log_prior(self) -> np.ndarray:
    """[C] float64 log p(z|x)."""
    return log_softmax(self.scores)

  @property
  def without_retrieval(self) -> "Reading":
    """Of the null passage alone."""
    return Reading(self.scores[:1], self.log_probs[:1])

  def log_likelihoods(self, pieces: Sequence[int]) -> np.ndarray:
    """[C] log p(y|z,x)."""
    return self.log_probs[:, np.arange(len(pieces)), pieces].sum(axis=1)

  def log_probability(self, pieces: Sequence[int]) -> float:
    """log p(y|x) = log Σ_z p(y|z,x) p(z|x). REALM, equation 1."""
    return float(np.logaddexp.reduce(self.log_likelihoods(pieces) + self.log_prior))

  def probability(self, pieces: Sequence[int]) -> float:
    return float(np.exp(self.log_probability(pieces)))

  def best(self, num: int) -> list[tuple[int, ...]]:
    """The most probable fillings, sought among the best of each candidate and of the masks taken one by one."""
    one_by_one = np.logaddexp.reduce(self.log_probs + self.log_prior[:, None, None])  # [M, V]
    found = {pieces for log_probs in (one_by_one, *self.log_probs) for pieces in best_fillings(log_probs, num)}
    return sorted(found, key=lambda pieces: (-self.log_probability(pieces), pieces))[:num]


def best_fillings(log_probs: np.ndarray, num: int) -> list[tuple[int, ...]]:
  """The `num` most probable fillings of independent masks, log_probs [M, V]; best first."""
  beam = [(0.0, ())]
  for row in log_probs:
    top = np.argpartition(-row, min(num, len(row)) - 1)[:num]
    grown = [(score + float(row[piece]), (*pieces, int(piece))) for score, pieces in beam for piece in top]
    beam = sorted(grown, key=lambda filling: (-filling[0], filling[1]))[:num]
  return [pieces for _, pieces in beam]


class PretrainedSystem:
  """A pre-trained snapshot over one corpus or several.

  Args:
    workdir: of realm_tf.pretrain.
    index_folders: indexes of the workdir's snapshot; none is its newest.

  Raises:
    ArtifactError: missing parts, or parts that do not belong together.
    UserError: a workdir of another kind.
  """

  def __init__(self, workdir: str, index_folders: Sequence[str] = ()):
    self.snapshot = snapshots.newest(workdir, advice="give the workdir of realm_tf.pretrain.")
    newest = artifacts.latest(os.path.join(workdir, "indexes"))
    if newest:  # while training goes on, the newest snapshot has no index yet
      self.snapshot = artifacts.step_folder(os.path.join(workdir, "snapshots"), artifacts.step_of(newest))
    if "retrieval" in artifacts.read_info(self.snapshot, kind=snapshots.KIND):
      raise artifacts.UserError(f"{workdir!r} is fine-tuned for questions: ask a --question, or give a pre-trained workdir.")
    if not newest and not index_folders:
      raise artifacts.ArtifactError(
          f"no index in {workdir!r}. Make one, and give it as --index=INDEX:\n"
          f"python -m beam_jobs.embed_passages --snapshot={self.snapshot} --passages=P --output=INDEX")
    self.tokenizer = snapshots.load_tokenizer(self.snapshot)
    self.retriever, self.reader = (snapshots.load_model(self.snapshot, name) for name in ("retriever", "reader"))
    self.corpora = [self._open(folder) for folder in index_folders or [newest]]

  def _open(self, folder: str) -> tuple[retrieval.IndexedRetriever, PassageTable]:
    source = index.passages_of(folder, advice=_PUT_BACK)
    examples.check_vocabulary(artifacts.read_info(source, kind=passages.KIND), source, self.tokenizer)
    searcher = index.load(folder, snapshot=self.snapshot, passages=source)
    return retrieval.IndexedRetriever(self.retriever, searcher, artifacts.step_of(self.snapshot), folder), passages.load(source)

  def explain(self, text: str, *, answer: str | None = None, num_candidates: int = 8) -> Report:
    """Explains one text.

    Args:
      text: with [MASK]s.
      answer: y; None is each corpus's most probable filling.
      num_candidates: C, the null passage included.

    Raises:
      UserError: a text or an answer that the models cannot take.
    """
    blank = BlankText.of(text, answer, self.tokenizer)
    query = blank.query(self.tokenizer, query_length=self.retriever.query_length, max_masks=self.reader.max_masks)
    found, readings = [], []
    query_ids = examples.pack_queries(query.ids.tensor(), tokenizer=self.tokenizer, length=self.retriever.query_length).numpy()
    for indexed, table in self.corpora:
      numbers, own = self._retrieve(blank, query_ids, indexed, table, num_candidates)
      reading, segments = self._read(query, query_ids, numbers, table, num_masks=sum(blank.sizes))
      pieces, alone = blank.pieces or reading.best(1)[0], reading.without_retrieval
      found.append(Explanation(
          index=indexed.folder, passages=table.folder, num_passages=len(table), own_passage=own,
          answer=answer or self._spell(blank, pieces), probability=reading.probability(pieces),
          without_retrieval=alone.probability(pieces),
          utility=reading.log_probability(pieces) - alone.log_probability(pieces),
          candidates=self._candidates(reading, pieces, blank.split(pieces), numbers, segments, table)))
      readings.append(reading)
    # The null passage is the same in every corpus.
    fillings = {pieces for reading in (alone, *readings) for pieces in reading.best(_NUM_ANSWERS)} | {blank.pieces} - {None}
    answers = [
        Answer(self._spell(blank, pieces), alone.probability(pieces), [reading.probability(pieces) for reading in readings])
        for pieces in sorted(fillings)]
    return Report("text", text, self.snapshot, artifacts.step_of(self.snapshot), found, best_first(answers))

  def _retrieve(self, blank: BlankText, query_ids: np.ndarray, indexed: retrieval.IndexedRetriever,
                table: PassageTable, num: int) -> tuple[np.ndarray, int | None]:
    """Numbers [C] of the candidates as in pre-training, and of the passage that holds the text itself."""
    near = indexed.search(query_ids, min(num, len(table))).numbers[0]
    sentences = lambda number: passages.sentences_of(
        table.texts[number], table.sentence_starts[number], table.sentence_ends[number])
    own = [int(number) for number in near if number != index.MISSING and any(map(blank.matches, sentences(number)))][:1]
    numbers = retrieval.candidates(
      indexed, query_ids, num=num, own_passages=np.array([own]) if own else None, null=True
    )[0]
    return np.append(numbers[:1], numbers[1:][numbers[1:] != index.MISSING]), own[0] if own else None

  def _read(self, query: examples.MaskedQueries, query_ids: np.ndarray, numbers: np.ndarray, table: PassageTable, *,
            num_masks: int) -> tuple[Reading, np.ndarray]:
    """What the models say, and the reader's segments [C, L]."""
    batch = examples.realm_batch(
        query, query_ids, numbers[None], table, tokenizer=self.tokenizer, query_length=self.retriever.query_length,
        passage_length=self.retriever.passage_length, reader_length=self.reader.length,
        title_length=self.retriever.title_length)
    queries = self.retriever.embed_queries(query_ids)  # [1, D]
    vectors = self.retriever.embed_passages(batch["passage_ids"][0], batch["passage_segments"][0])  # [C, D]
    logits = self.reader({  # [C, M, V]
        "token_ids": batch["reader_ids"][0], "segment_ids": batch["reader_segments"][0],
        "mask_positions": np.repeat(query.mask_positions, len(numbers), axis=0)})
    scores = ops.convert_to_numpy(ops.einsum("bd,cd->c", queries, vectors))
    return Reading(scores, log_softmax(ops.convert_to_numpy(logits)[:, :num_masks])), batch["reader_segments"][0]

  def _candidates(self, reading: Reading, pieces: Sequence[int], by_blank: Sequence[Sequence[int]], numbers: np.ndarray,
                  segments: np.ndarray, table: PassageTable) -> list[Candidate]:
    log_prior, log_likelihoods, found = reading.log_prior, reading.log_likelihoods(pieces), []
    for at, number in enumerate(map(int, numbers)):
      title, text = ("", "") if number == NULL_PASSAGE else (table.titles[number], table.texts[number])
      found.append(Candidate(
          number=number, title=title, text=text, score=float(reading.scores[at]), prior=float(np.exp(log_prior[at])),
          likelihood=float(np.exp(log_likelihoods[at])), utility=float(log_likelihoods[at] - log_likelihoods[0]),
          joint=float(np.exp(log_likelihoods[at] + log_prior[at])), reader_score=None, best_span=None,
          evidence=occurrences(table, number, by_blank, continues=self.tokenizer.continues),
          bytes_read=bytes_read(table, number, segments[at])))
    return found

  def _spell(self, blank: BlankText, pieces: Sequence[int]) -> str:
    return " … ".join(map(self.tokenizer.spell, blank.split(pieces)))


# ========================================================================================================== a question


def explain_question(workdir: str, question: str, index_folders: Sequence[str] = ()) -> Report:
  """Explains a fine-tuned system's answer to one question by the passages that its reader read.

  Args:
    workdir: of realm_tf.finetune.
    index_folders: indexes of the snapshot that it was fine-tuned from; none is the one that it was fine-tuned with.

  Raises:
    ArtifactError: missing parts, or parts that do not belong together.
    UserError: a question, or a workdir, that there is nothing to show of.
  """
  snapshot = snapshots.newest(workdir, advice="give the workdir of realm_tf.finetune.")
  info = artifacts.read_info(snapshot, kind=snapshots.KIND)
  if "retrieval" not in info:
    raise artifacts.UserError(f"{workdir!r} is not fine-tuned for questions: give a --text with {MASK}, or a fine-tuned workdir.")
  if info["retrieval"] == "none":
    raise artifacts.UserError(f"{workdir!r} answers closed-book: it retrieves nothing that could be looked into.")
  found, spans = [], []
  for folder in index_folders or [None]:
    answerer = evaluate.Answerer(workdir, index_folder=folder, passages_folder=folder and index.passages_of(folder, advice=_PUT_BACK))
    spans.append(Spans.of(question, answerer))
    searched = answerer.indexed.folder if answerer.kind == "dense" else answerer.kind
    found.append(spans[-1].explain(searched))
  texts = {best.text for read in spans for best in read.best if best.text}
  answers = [Answer(text, None, [float(read.probabilities(text).sum()) for read in spans]) for text in sorted(texts)]
  return Report("question", question, snapshot, artifacts.step_of(snapshot), found, best_first(answers))


@dataclasses.dataclass(frozen=True)
class Spans:
  """What a fine-tuned system says of one question and the R passages that it reads.

  Attributes:
    numbers, scores: [K] of the retriever's beam.
    reader_ids, segments: [R, L].
    log_probs: [R, L, W] float64 log p(span|x) among the spans of all passages read, as in the reader's loss.
    best: each passage's best span.
    answer: the best of all.
  """

  answerer: evaluate.Answerer
  numbers: np.ndarray
  scores: np.ndarray
  reader_ids: np.ndarray
  segments: np.ndarray
  log_probs: np.ndarray
  best: Sequence[evaluate.Answer]
  answer: evaluate.Answer

  @classmethod
  def of(cls, question: str, answerer: evaluate.Answerer) -> "Spans":
    """Retrieves and reads.

    Raises:
      UserError: an empty question or one that is too long, or nothing to read.
    """
    size, room = len(answerer.tokenizer([question]).to_list()[0]), answerer.reader.query_length - 2
    if not 0 < size <= room:
      raise artifacts.UserError(f"the question has {size} word pieces, the system takes 1 to {room}. Ask in other words.")
    inputs, numbers = answerer.examples([Question(question, [])]).inputs(np.arange(1))
    outputs = answerer.model.predict_on_batch(inputs)
    ids, segments, scores = inputs["reader_ids"][0], inputs["reader_segments"][0], outputs["beam_scores"][0]
    spans, mask = outputs["span_scores"][0], outputs["span_mask"][0]
    best = lambda rows: answering.best_answer(
        spans[rows], mask[rows], ids[rows], segments[rows], numbers[0][rows], scores, answerer.table,
        continues=answerer.tokenizer.continues)
    answer = best(slice(None))
    if not answer.text:
      raise artifacts.UserError("the passages found have no text to read an answer from. Give another index.")
    log_probs = log_softmax(np.where(mask > 0, spans, -np.inf).reshape(-1)).reshape(spans.shape)
    return cls(answerer=answerer, numbers=numbers[0], scores=scores, reader_ids=ids, segments=segments, log_probs=log_probs,
               best=[best(slice(row, row + 1)) for row in range(len(ids))], answer=answer)

  def probabilities(self, text: str) -> np.ndarray:
    """[R] p(y,z|x): of each passage's spans that read y."""
    tokenizer = self.answerer.tokenizer
    reads = examples.answer_spans(self.reader_ids, self.segments, tokenizer([text]).to_list(), tokenizer=tokenizer,
                                  max_span=self.log_probs.shape[-1])
    return (np.exp(self.log_probs) * reads).sum(axis=(1, 2))

  def explain(self, folder: str) -> Explanation:
    """The passages read; `folder` is the index."""
    table, tokenizer = self.answerer.table, self.answerer.tokenizer
    prior, joint = np.exp(log_softmax(self.scores)), self.probabilities(self.answer.text)
    wanted, candidates = tokenizer([self.answer.text]).to_list(), []
    for at, best in enumerate(self.best):
      number, score = int(self.numbers[at]), float(self.scores[at])
      if number == index.MISSING:
        continue
      candidates.append(Candidate(
          number=number, title=table.titles[number], text=table.texts[number], score=score, prior=float(prior[at]),
          likelihood=None, utility=None, joint=float(joint[at]), reader_score=best.score - score if best.text else None,
          best_span=best.byte_span if best.text else None,
          evidence=occurrences(table, number, wanted, continues=tokenizer.continues),
          bytes_read=bytes_read(table, number, self.segments[at])))
    return Explanation(
        index=folder, passages=table.folder, num_passages=len(table), answer=self.answer.text, probability=float(joint.sum()),
        without_retrieval=None, utility=None, own_passage=None, candidates=candidates)


# ======================================================================================================= what both need


def log_softmax(scores: np.ndarray) -> np.ndarray:
  """Over the last axis, in float64."""
  scores = scores.astype(np.float64)
  scores = scores - scores.max(axis=-1, keepdims=True)
  return scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))


def occurrences(table: PassageTable, number: int, answers: Iterable[Sequence[int]], *,
                continues: np.ndarray) -> list[tuple[int, int]]:
  """Byte ranges of a passage's UTF-8 text where any of these word pieces stand as whole words."""
  if number == NULL_PASSAGE:
    return []
  ids, starts, ends, found = table.text_ids[number], table.token_starts[number], table.token_ends[number], set()
  goes_on = np.append(continues[ids], False)  # at i: word piece i belongs to the word of i - 1
  for pieces in answers:
    for at in range(len(ids) - len(pieces) + 1):
      end = at + len(pieces)
      if np.array_equal(ids[at:end], pieces) and not goes_on[at] and not goes_on[end]:
        found.add((int(starts[at]), int(ends[end - 1])))
  return sorted(found)


def bytes_read(table: PassageTable, number: int, segments: np.ndarray) -> int:
  """How much of a passage's UTF-8 text is in the reader's input, whose segments [L] are 1 there and at the [SEP] after it."""
  num_pieces = np.count_nonzero(segments) - 1
  return int(table.token_ends[number][num_pieces - 1]) if num_pieces else 0


def best_first(answers: Iterable[Answer]) -> list[Answer]:
  return sorted(answers, key=lambda answer: -answer.probabilities[-1])


# ================================================================================================================= runs


def explain(workdir: str, *, text: str | None = None, question: str | None = None, answer: str | None = None,
            index_folders: Sequence[str] = (), num_candidates: int = 8) -> Report:
  """Explains one text or one question.

  Raises:
    UserError: neither or both of them, or one that cannot be taken.
    ArtifactError: missing parts, or parts that do not belong together.
  """
  if (text is None) == (question is None):
    raise artifacts.UserError("give either --text or --question.")
  if text is not None:
    return PretrainedSystem(workdir, index_folders).explain(text, answer=answer, num_candidates=num_candidates)
  if answer is not None:
    raise artifacts.UserError("--answer goes with --text: a question is answered by the system itself.")
  return explain_question(workdir, question, index_folders)


def main(argv):
  del argv
  args = flags.FLAGS
  if args.output:
    artifacts.gfile.makedirs(args.output)
  report = explain(args.workdir, text=args.text, question=args.question, answer=args.answer, index_folders=args.index or (),
                   num_candidates=args.num_candidates)
  explanations.print_report(report, Console(highlight=False))
  if args.output:
    artifacts.write_text(os.path.join(args.output, "explain.json"),
                         json.dumps(dataclasses.asdict(report), indent=2, ensure_ascii=False) + "\n")
    artifacts.write_text(os.path.join(args.output, "explain.html"), explanations.html_page(report))


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "A trainer's workdir.", required=True)
  flags.DEFINE_string("text", None, "A text with [MASK], for a pre-trained workdir.")
  flags.DEFINE_string("answer", None, "y, what should stand at [MASK]; the most probable filling where it is not given.")
  flags.DEFINE_string("question", None, "A question, for a fine-tuned workdir.")
  flags.DEFINE_multi_string("index", None, "An index instead of the workdir's own; give it again to compare corpora.")
  flags.DEFINE_integer("num_candidates", 8, "Candidates of a text, the null passage included.", lower_bound=1)
  flags.DEFINE_string("output", None, "Folder for explain.json and explain.html.")
  settings.start(main)

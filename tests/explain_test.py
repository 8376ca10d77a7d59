"""What `realm_tf.explain` shows.

It shows the trainer's numbers and the passages' own text, and says plainly what it cannot show.
"""

import dataclasses
import html.parser
import io
import itertools
import json
import os
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
from rich.console import Console

from beam_jobs import embed_passages
from realm_tf import explain, finetune
from realm_tf.corpus import passages
from realm_tf.corpus.candidates import NULL_PASSAGE
from realm_tf.corpus.vocabularies import MASK
from realm_tf.examples import masking, packing
from realm_tf.examples.open_qa import QaExamples
from realm_tf.examples.questions import Question
from realm_tf.examples.realm import realm_batch
from realm_tf.models import losses, snapshots
from realm_tf.models.realm import RealmModel
from realm_tf.retrieval import dense
from realm_tf.storage import artifacts
from realm_tf.storage.columns import Ragged
from realm_tf.systems import evidence, explanation_page, explanations
from realm_tf.systems.mask_filling import MaskFilling
from realm_tf.systems.masked_text import MaskedText, Reading
from realm_tf.systems.question_answering import QuestionAnswering
from realm_tf.systems.workdir import open_workdir
from tests.conftest import eagerly, index_of
from tests.processes import REPOSITORY

TEXT = "The river [MASK] flows into the sea."
INJECTION = "<script>window.owned = 1</script><img src=x onerror='window.owned = 2'>"
NEWER = [  # accents, markup, a text too long for the reader, places without an answer
  {
    "title": "Málmor & <b>Sélis</b>",
    "text": f"The river MÁLMOR 日本 flows into the sea at Sélis. {INJECTION} Malmor's end.",
  },
  {
    "title": "Long",
    "text": "The river of Málmorton is not it. "
    + "".join(f"It bends {i} times. " for i in range(14))
    + "At Málmor it ends.",
  },
  {"title": "Other", "text": "Nothing here.\x1b[31m The baker sells bread."},
]


@pytest.fixture(scope="module")
def workdir(toy, tmp_path_factory) -> str:
  """A pre-trained workdir of the toy's untrained models with their index."""
  workdir = str(tmp_path_factory.mktemp("realm"))
  models = {
    "retriever": snapshots.load_retriever(toy.path("ict/snapshots/00000000")),
    "reader": snapshots.load_model(toy.path("warm/snapshots/00000000"), "reader"),
  }
  keras.utils.set_random_seed(1)
  for weight in models["reader"].weights:  # an untrained one cannot tell passages apart
    weight.assign(weight + 0.3 * keras.random.normal(weight.shape))
  snapshot = snapshots.publish(
    os.path.join(workdir, "snapshots"),
    3,
    models,
    made_by="pretrain",
    tokenizer=snapshots.load_tokenizer(toy.path("ict/snapshots/00000000")),
  )
  embed_passages.embed(
    os.path.join(workdir, "indexes/00000003"),
    snapshot=snapshot,
    passages_folder=toy.config().passages,
    jit_compile=False,
  )
  return workdir


@pytest.fixture(scope="module")
def newer(toy, workdir, tmp_path_factory) -> str:
  """An index of another corpus, made with the same snapshot."""
  return index_of(
    NEWER,
    tmp_path_factory.mktemp("newer"),
    toy=toy,
    snapshot=os.path.join(workdir, "snapshots/00000003"),
    max_tokens=300,
  )


@pytest.fixture(scope="module")
def system(workdir) -> MaskFilling:
  return MaskFilling(explain.open_pretrained(workdir))


@pytest.fixture(scope="module")
def newer_system(workdir, newer) -> MaskFilling:
  return MaskFilling(explain.open_pretrained(workdir, [newer]))


@pytest.fixture(scope="module")
def tuned(toy, tmp_path_factory) -> str:
  """A fine-tuned workdir."""
  workdir = str(tmp_path_factory.mktemp("finetuned"))
  with eagerly():
    finetune.finetune(toy.config(finetune__num_read=3), workdir)
  return workdir


# ------------------------------------------------------------------------------------------- values


def masked_sentence(toy) -> tuple[passages.Sentence, int, int]:
  """A sentence of the corpus and a salient span of several word pieces in it."""
  rows = passages.read_shard(
    passages.shard_paths(toy.config().knowledge_spans, "spans")[0], passages.Sentence
  )
  return next(
    (row, start, end)
    for row in rows
    for start, end in zip(row.span_starts, row.span_ends, strict=True)
    if 2 < end - start < 5
  )


def test_numbers_are_the_trainers_own(toy, system):
  row, start, end = masked_sentence(toy)
  first, last = row.token_starts[start], row.token_ends[end - 1]
  answer = row.text.encode()[first:last].decode()
  text = f"{row.text.encode()[:first].decode()}{MASK}{row.text.encode()[last:].decode()}"
  # all passages but its own, and the null passage
  got = system.explain(text, answer=answer, num_candidates=32).explanations[0]

  indexed, tokenizer = system.indexes[0], system.tokenizer
  table = indexed.table
  lengths = {"query_length": 24, "passage_length": 44, "reader_length": 64}
  queries = masking.mask_spans(
    [np.array(row.ids)], [start], [end], [row.passage], tokenizer=tokenizer, max_masks=5
  )
  query_ids = packing.pack_queries(queries.ids.tensor(), tokenizer=tokenizer, length=24).numpy()
  numbers = dense.candidates(
    indexed, query_ids, num=32, own_passages=queries.own_passages, null=True
  )
  model = RealmModel(system.retriever, system.reader)
  outputs = model.predict_on_batch(
    realm_batch(queries, query_ids, numbers, table, tokenizer=tokenizer, **lengths)
  )
  wanted = losses.marginal_masked_lm(
    outputs["token_log_probs"], outputs["scores"], queries.target_mask
  )

  assert (
    got.own_passage == row.passage
    and [candidate.number for candidate in got.candidates] == numbers[0].tolist()
  )

  def value(name):
    return [getattr(candidate, name) for candidate in got.candidates]

  likelihoods = np.exp(wanted.log_likelihoods[0])
  np.testing.assert_allclose(value("score"), outputs["scores"][0], rtol=1e-4)
  np.testing.assert_allclose(value("prior"), np.exp(wanted.log_prior[0]), rtol=1e-4)
  np.testing.assert_allclose(value("likelihood"), likelihoods, rtol=1e-3)
  np.testing.assert_allclose(
    value("utility"), wanted.log_likelihoods[0] - wanted.log_likelihoods[0, 0], atol=1e-3
  )
  np.testing.assert_allclose(value("joint"), likelihoods * np.exp(wanted.log_prior[0]), rtol=1e-3)
  assert got.probability == pytest.approx(float(np.exp(-wanted.loss[0])), rel=1e-3)
  assert got.without_retrieval == pytest.approx(float(likelihoods[0]), rel=1e-3)
  assert (
    max(value("likelihood")) > 2 * min(value("likelihood")) and len(set(value("prior"))) == 32
  ), "passages make a difference"


def by_hand(system, report, before: str, after: str, pieces: list[int]) -> dict[str, np.ndarray]:
  """Returns p(z|x) [C] and p(y|z,x) [C] in float64.

  They come only from packing written out here and from the models' outputs.
  """
  table = system.indexes[0].table
  tokenizer, cls, sep, mask = (
    system.tokenizer,
    system.tokenizer.cls_id,
    system.tokenizer.sep_id,
    system.tokenizer.mask_id,
  )
  left, right = tokenizer([before]).to_list()[0], tokenizer([after]).to_list()[0]
  query = [*left, *[mask] * len(pieces), *right]

  def pad(ids, length):
    return np.array([ids + [0] * (length - len(ids))], np.int32)

  vector = np.array(system.retriever.embed_queries(pad([cls, *query, sep], 24)), np.float64)[0]
  scores, likelihoods = [], []
  for candidate in report.explanations[0].candidates:
    null = candidate.number == NULL_PASSAGE
    title, words = (
      ([], [])
      if null
      else (part[candidate.number].tolist() for part in (table.title_ids, table.text_ids))
    )
    words = words[: 44 - 3 - len(title)]
    ids, segments = [cls, *title, sep, *words, sep], [0] * (len(title) + 2) + [1] * (len(words) + 1)
    scores.append(
      vector
      @ np.array(system.retriever.embed_passages(pad(ids, 44), pad(segments, 44)), np.float64)[0]
    )
    words = [] if null else table.text_ids[candidate.number].tolist()[: 64 - 3 - len(query)]
    ids, segments = [cls, *query, sep, *words, sep], [0] * (len(query) + 2) + [1] * (len(words) + 1)
    positions = pad([1 + len(left) + i for i in range(len(pieces))], 5)
    inputs = {
      "token_ids": pad(ids, 64),
      "segment_ids": pad(segments, 64),
      "mask_positions": positions,
    }
    logits = np.array(system.reader(inputs), np.float64)
    p = 1.0
    for at, piece in enumerate(pieces):
      p *= np.exp(logits[0, at, piece]) / np.exp(logits[0, at]).sum()
    likelihoods.append(p)
  return {"prior": np.exp(scores) / np.exp(scores).sum(), "likelihood": np.array(likelihoods)}


def test_numbers_are_equation_1(system):
  answer = "Gorneth"
  pieces = system.tokenizer([answer]).to_list()[0]
  report = system.explain(TEXT, answer=answer, num_candidates=6)
  got, wanted = (
    report.explanations[0],
    by_hand(system, report, "The river ", " flows into the sea.", pieces),
  )
  marginal = float((wanted["prior"] * wanted["likelihood"]).sum())
  assert len(pieces) > 1 and got.own_passage is None and got.candidates[0].number == NULL_PASSAGE
  for name in wanted:
    np.testing.assert_allclose(
      [getattr(candidate, name) for candidate in got.candidates], wanted[name], rtol=1e-3
    )
  assert got.probability == pytest.approx(marginal, rel=1e-3)
  assert sum(candidate.prior for candidate in got.candidates) == pytest.approx(1, abs=1e-12)
  assert sum(candidate.joint for candidate in got.candidates) == pytest.approx(
    got.probability, rel=1e-12
  )
  assert (
    got.without_retrieval == pytest.approx(got.candidates[0].likelihood)
    and got.candidates[0].utility == 0
  )
  assert got.utility == pytest.approx(np.log(marginal / wanted["likelihood"][0]), abs=1e-3)
  given = next(row for row in report.answers if row.text == "gorneth")
  assert (given.probabilities, given.without_retrieval) == (
    [got.probability],
    got.without_retrieval,
  )


def test_own_answer_is_the_most_probable_of_all(system):
  for text in (TEXT, f"The {MASK} {MASK} flows into the sea."):
    num = text.count(MASK)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(
        Reading,
        "best",
        lambda self, n, best=Reading.best, seen=seen: seen.append(self) or best(self, n),
      )
      report = system.explain(text, num_candidates=4)
    reading = next(reading for reading in seen if len(reading.scores) == 4)
    prior, probs = (
      np.exp(reading.scores - np.logaddexp.reduce(reading.scores)),
      np.exp(reading.log_probs),
    )  # [C], [C, M, V]
    joint = np.einsum(
      "c,ca,cb->ab", prior, probs[:, 0], probs[:, 1] if num == 2 else np.ones([4, 1])
    )
    best = np.unravel_index(np.argmax(joint), joint.shape)[:num]
    got = report.explanations[0]
    assert got.answer == " ".join(system.tokenizer.pieces[piece] for piece in best).replace(
      " ##", ""
    )
    assert got.probability == pytest.approx(joint.max(), rel=1e-6) and joint.sum() == pytest.approx(
      1, abs=1e-5
    )
    assert report.answers[0].text == got.answer
    ranks = [row.probabilities[0] for row in report.answers]
    np.testing.assert_allclose(ranks[:3], np.sort(joint.ravel())[::-1][:3], rtol=1e-6)
    assert ranks == sorted(ranks, reverse=True)
    alone = max(row.without_retrieval for row in report.answers)
    assert alone == pytest.approx(np.prod(probs[0].max(axis=-1)), rel=1e-6), (
      "the null passage's best filling is listed too"
    )


# ---------------------------------------------------------------------------- several blanks, marks


def test_blanks_are_filled_side_by_side(system):
  tokenizer = system.tokenizer
  blank = MaskedText.of(f"{MASK}{MASK} met {MASK}.", None, tokenizer)
  query = blank.query(tokenizer, query_length=24, max_masks=5)
  ids = query.ids[0].tolist()
  assert blank.segments == ["", " met ", "."] and blank.sizes == [2, 1]
  assert (
    [ids[at - 1] for at in query.mask_positions[0, :3]]
    == [tokenizer.mask_id] * 3
    == [ids[0], ids[1], ids[-2]]
  )
  assert query.target_mask.tolist() == [[1, 1, 1, 0, 0]] and ids.count(tokenizer.mask_id) == 3
  report = system.explain(f"{MASK}{MASK} met {MASK}.")
  assert all(" … " in row.text for row in report.answers) and " … " in report.explanations[0].answer


def test_evidence_is_in_the_passages_own_words(newer_system):
  got = newer_system.explain(TEXT, answer="malmor", num_candidates=4).explanations[0]
  table = passages.load(got.passages)
  by_title = {candidate.title: candidate for candidate in got.candidates}
  marked = {
    title: [candidate.text.encode()[start:end].decode() for start, end in candidate.evidence]
    for title, candidate in by_title.items()
  }
  assert marked == {
    "": [],
    NEWER[0]["title"]: ["MÁLMOR", "Malmor"],
    "Long": ["Málmor"],
    "Other": [],
  }
  for candidate in got.candidates[1:]:
    assert candidate.text == table.texts[candidate.number]
    assert "".join(run.text for run in candidate.runs()) == candidate.text
    assert [run.text for run in candidate.runs() if "evidence" in run.names] == marked[
      candidate.title
    ]


def test_what_the_reader_did_not_see_is_told(newer_system):
  """A text has more word pieces than the reader takes.

  The rest is greyed out, and evidence there is still marked.
  """
  table, tokenizer = newer_system.indexes[0].table, newer_system.tokenizer
  number = table.titles.index("Long")
  ids = packing.pack_reader(
    Ragged.of([[7] * 10], np.int32).tensor(),
    Ragged.of([table.text_ids[number]], np.int32).tensor(),
    tokenizer=tokenizer,
    query_length=24,
    length=64,
  )
  read = evidence.bytes_read(table, number, ids.segment_ids.numpy()[0])
  assert read == table.token_ends[number][64 - 3 - 10 - 1] < len(table.texts[number].encode())
  marked = evidence.occurrences(
    table, number, tokenizer(["Malmor"]).to_list(), continues=tokenizer.continues
  )
  candidate = explanations.Candidate(
    number, "Long", table.texts[number], 0.0, 1.0, 1.0, 0.0, 1.0, None, None, marked, read
  )
  assert [run.text for run in candidate.runs() if run.names == {"evidence", "unread"}] == [
    "Málmor"
  ], "Málmorton is another word"
  assert (
    sum(len(run.text.encode()) for run in candidate.runs() if "unread" not in run.names) == read
  )


# ------------------------------------------------------------------------------------------ corpora


def test_same_snapshot_over_two_corpora(workdir, newer, system, newer_system):
  own = os.path.join(workdir, "indexes/00000003")
  report = explain.explain(workdir, text=TEXT, index_folders=[own, newer], num_candidates=3)
  # `system` uses the workdir's own index
  alone = [one.explain(TEXT, num_candidates=3) for one in (system, newer_system)]
  assert report.explanations == [one.explanations[0] for one in alone] and report.step == 3
  assert [explanation.num_passages for explanation in report.explanations] == [32, len(NEWER)]
  for at, one in enumerate(alone):
    assert {row.text for row in one.answers} <= {row.text for row in report.answers}
    together = {row.text: row.probabilities[at] for row in report.answers}
    for row in one.answers:
      assert together[row.text] == row.probabilities[0]
  newest = [row.probabilities[1] for row in report.answers]
  assert newest == sorted(newest, reverse=True)


# ---------------------------------------------------------------------------------------- questions


def test_question_is_answered_as_in_evaluation(toy, tuned):
  asked = "Where does the Gorneth flow?"
  report = explain.explain(tuned, question=asked)
  got = report.explanations[0]
  answerer = QuestionAnswering(open_workdir(tuned))
  (answer,) = answerer.predict([Question(asked, [])])
  data = QaExamples(
    [Question(asked, [])],
    answerer.table,
    tokenizer=answerer.tokenizer,
    search=answerer.search,
    embeddings=answerer.embeddings,
    reader=answerer.reader,
    num_read=3,
  )
  inputs, numbers = data.inputs(np.arange(1))
  outputs = answerer.model.predict_on_batch(inputs)
  scores, mask = (outputs[name][0].astype(np.float64) for name in ("span_scores", "span_mask"))
  ids, total, by_passage = answerer.tokenizer([answer.text]).to_list()[0], 0.0, np.zeros(3)
  for row, start, width in itertools.product(*map(range, scores.shape)):
    p = np.exp(scores[row, start, width]) * mask[row, start, width]
    total += p
    read = inputs["reader_ids"][0, row, start : start + width + 2].tolist()
    if read[: width + 1] == ids and not answerer.tokenizer.continues[read[width + 1]]:
      by_passage[row] += p
  beam = np.exp(outputs["beam_scores"][0].astype(np.float64))
  assert (report.kind, got.answer, got.without_retrieval) == ("question", answer.text, None)
  assert got.index == answerer.retrieval.indexed.folder
  assert [candidate.number for candidate in got.candidates] == numbers[0][:3].tolist()
  np.testing.assert_allclose(
    [candidate.joint for candidate in got.candidates], by_passage / total, rtol=1e-4, atol=1e-12
  )
  np.testing.assert_allclose(
    [candidate.prior for candidate in got.candidates], (beam / beam.sum())[:3], rtol=1e-4
  )
  assert got.probability == pytest.approx(
    sum(candidate.joint for candidate in got.candidates), rel=1e-12
  )
  best = next(candidate for candidate in got.candidates if candidate.number == answer.read_from)
  assert best.best_span == answer.byte_span and best.best_span in best.evidence
  assert best.reader_score + best.score == pytest.approx(answer.score, rel=1e-5)
  texts = {
    candidate.text.encode()[slice(*candidate.best_span)].decode() for candidate in got.candidates
  }
  assert (
    texts == {row.text for row in report.answers}
    and sum(row.probabilities[0] for row in report.answers) <= 1
  )


def test_question_over_another_corpus(toy, tuned, tmp_path):
  base = toy.path("ict/snapshots/00000000")
  article = {"title": "Gorneth", "text": "The Gorneth flows to Málmor."}
  other = index_of([article], tmp_path, toy=toy, snapshot=base, max_tokens=64)
  folders = [toy.path("ict/indexes/00000000"), other]
  report = explain.explain(tuned, question="Where does the Gorneth flow?", index_folders=folders)
  old, new = report.explanations
  assert old.num_passages == 32 and old.answer in {
    candidate.text[slice(*candidate.best_span)] for candidate in old.candidates
  }
  assert (
    new.num_passages == 1
    and new.candidates[0].prior == 1
    and new.answer in "The Gorneth flows to Málmor."
  )
  row = next(row for row in report.answers if row.text == new.answer)
  assert row.probabilities[1] == new.probability > 0


# ----------------------------------------------------------------------------------------- refusals


def test_mistakes_are_told_in_one_sentence(toy, workdir, system, tuned, newer, tmp_path):
  sparse, base = str(tmp_path / "sparse"), os.path.join(workdir, "snapshots/00000003")
  shutil.copytree(os.path.join(workdir, "snapshots"), os.path.join(sparse, "snapshots"))
  closed = str(tmp_path / "closed")
  snapshots.publish(
    os.path.join(closed, "snapshots"),
    1,
    {"reader": snapshots.load_model(base, "reader")},
    made_by="finetune",
    tokenizer=snapshots.load_tokenizer(base),
    details={"retrieval": "none", "passages": toy.config().passages},
  )
  foreign = toy.path("ict/indexes/00000000")
  cases = {
    "either --text or --question": dict(),
    "either --text or --question.": dict(text=TEXT, question="who"),
    "--answer goes with --text": dict(question="who", answer="me"),
    "no [MASK]": dict(text="The river flows."),
    "6 word pieces are masked, but the snapshot's reader fills up to 5": dict(
      text=" ".join([MASK] * 6)
    ),
    "queries have up to 22": dict(text=TEXT + " and so on" * 12),
    "is [UNK] [UNK] in": dict(text=TEXT, answer="日本"),
    "is nothing in": dict(text=TEXT, answer=" "),
    "3 masks": dict(text=f"{MASK} and {MASK} or {MASK}", answer="a b"),
    "is not fine-tuned for questions": dict(question="who"),
    "is fine-tuned for questions": dict(workdir=tuned, text=TEXT),
    "answers closed-book": dict(workdir=closed, question="who"),
    "the question has 0 word pieces": dict(workdir=tuned, question=" "),
    "system takes 1 to 22": dict(workdir=tuned, question="who " * 30),
    "no snapshot in": dict(workdir=str(tmp_path), text=TEXT),
    "wanted reader": dict(workdir=toy.path("ict"), text=TEXT),
    "beam_jobs.embed_passages --snapshot=": dict(workdir=sparse, text=TEXT),
    "was made from snapshot": dict(text=TEXT, index_folders=[foreign]),
    "does not exist": dict(text=TEXT, index_folders=[str(tmp_path / "none")]),
    "candidates asked for": dict(text=TEXT, index_folders=[newer], num_candidates=1000),
  }
  for words, what in cases.items():
    with pytest.raises(artifacts.UserError) as caught:
      if "text" in what and what.keys() <= {"text", "answer"}:
        system.explain(**what)
      else:
        explain.explain(**{"workdir": workdir} | what)
    assert words.rstrip(".") in str(caught.value)
  report = explain.explain(sparse, text=TEXT, index_folders=[newer], num_candidates=2)
  assert report.step == 3 and len(report.explanations) == 1, (
    "snapshots are enough if an index is given"
  )


# -------------------------------------------------------------------------------------------- shown


class Page(html.parser.HTMLParser):
  """Collects tags with their attributes, and the text outside <style>."""

  def __init__(self, source: str):
    super().__init__()
    self.tags, self.text, self.marked = [], "", []
    self.feed(source)

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_data(self, data):
    if self.tags[-1:] and self.tags[-1][0] != "style":
      self.text += data
    if (
      self.tags[-1:]
      and self.tags[-1][0] == "mark"
      and "evidence" in self.tags[-1][1]["class"]
      and self.cdata_elem is None
    ):
      self.marked.append(data)
      self.tags.append(("", {}))


def test_page_is_one_harmless_file(newer_system):
  report = newer_system.explain(TEXT, answer="malmor", num_candidates=3)
  source = explanation_page.html_page(dataclasses.replace(report, x=f"{INJECTION} {MASK}"))
  page = Page(source)
  names = {tag for tag, _ in page.tags}
  assert not names & {"script", "img"} and INJECTION in page.text and "<script" not in source
  assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)
  loaded = [
    value
    for _, attributes in page.tags
    for name, value in attributes.items()
    if name in ("src", "href")
  ]
  assert (
    loaded == ["data:,"]
    and "@import" not in source
    and "url(" not in source
    and len(source) < 60_000
  )
  wanted = [
    run.text
    for candidate in report.explanations[0].candidates
    for run in candidate.runs()
    if "evidence" in run.names
  ]
  assert page.marked == wanted
  twice = dataclasses.replace(report, explanations=report.explanations * 2)
  assert explanation_page.html_page(twice).count('<section class="candidates">') == 2
  assert "viewport" in source and "prefers-color-scheme: dark" in source


def test_terminal_page_fits_and_is_clean(newer_system):
  report = newer_system.explain(TEXT, answer="malmor", num_candidates=4)
  printed = {}
  for width, terminal in ((60, False), (100, True)):
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, highlight=False)
    explanations.print_report(report, console)
    printed[terminal] = console.file.getvalue()
    assert terminal or max(map(len, printed[terminal].splitlines())) <= width
  for candidate in report.explanations[0].candidates:
    for measure in candidate.measures():
      assert measure.shown in printed[False]
    for run in candidate.runs():
      assert "evidence" not in run.names or f">>{run.text}<<" in printed[False]
  assert any("\x1b" in candidate.text for candidate in report.explanations[0].candidates)
  assert (
    "\x1b" not in printed[False] and "\x1b[31m" not in printed[True] and ">>" not in printed[True]
  )
  assert "\x1b[" in printed[True]


def test_probabilities_in_print():
  shown = {
    p: explanations.show_probability(p)
    for p in (0.0, 1.0, 0.129, 0.0421, 0.00123, 1.1e-14, 9.96e-4)
  }
  assert list(shown.values()) == ["0", "1.000", "0.129", "0.042", "0.0012", "1.1×10⁻¹⁴", "1.0×10⁻³"]


def test_command(workdir, newer, tmp_path):
  own = os.path.join(workdir, "indexes/00000003")
  command = [
    sys.executable,
    "-m",
    "realm_tf.explain",
    f"--workdir={workdir}",
    f"--text={TEXT}",
    "--num_candidates=3",
  ]
  # or long paths are cut
  done = subprocess.run(
    [*command, f"--index={own}", f"--index={newer}", f"--output={tmp_path}/out"],
    cwd=REPOSITORY,
    capture_output=True,
    text=True,
    timeout=120,
    env={**os.environ, "COLUMNS": "240"},
  )
  assert done.returncode == 0, done.stderr
  saved = json.loads((tmp_path / "out/explain.json").read_text())
  wanted = explain.explain(workdir, text=TEXT, index_folders=[own, newer], num_candidates=3)
  assert set(saved) == {"kind", "x", "snapshot", "step", "explanations", "answers"}
  assert set(saved["explanations"][0]) == {
    field.name for field in dataclasses.fields(explanations.Explanation)
  }
  assert set(saved["explanations"][0]["candidates"][0]) == {
    field.name for field in dataclasses.fields(explanations.Candidate)
  }
  for got, one in zip(saved["explanations"], wanted.explanations, strict=True):
    assert (got["index"], got["answer"]) == (one.index, one.answer)
    assert got["probability"] == pytest.approx(one.probability, rel=1e-5)
    assert sum(candidate["joint"] for candidate in got["candidates"]) == pytest.approx(
      got["probability"]
    )
    assert one.answer in done.stdout and one.passages in done.stdout.replace("\n", "")
  assert (tmp_path / "out/explain.html").read_text().startswith("<!doctype html>")

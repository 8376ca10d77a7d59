"""Closed-book answers: the masked reader answers from the null passage alone.

The question is followed by [MASK]s; the reader is fine-tuned to fill them with the answer's word
pieces and a final [SEP].
"""

from collections.abc import Sequence

import numpy as np

from realm_tf.corpus.candidates import NULL_PASSAGE
from realm_tf.corpus.tokenization import Tokenizer
from realm_tf.examples import packing
from realm_tf.examples.answering import Prediction
from realm_tf.examples.questions import Question
from realm_tf.models.masked_reader import MaskedReader
from realm_tf.storage.columns import Ragged
from realm_tf.systems.workdir import Workdir

_BATCH_SIZE = 32  # questions answered at once


class ClosedBook:
  """A fine-tuned system that answers questions without passages.

  Args:
    opened: the system's workdir.
  """

  table = None

  def __init__(self, opened: Workdir):
    self.workdir, self.tokenizer = opened, opened.tokenizer
    self.reader = opened.load_model("reader")

  def predict(self, rows: Sequence[Question]) -> list[Prediction]:
    """Answers questions in batches; answers have no scores and no passages."""
    return [
      Prediction(text, 0.0, NULL_PASSAGE, (0, 0), np.zeros([0], np.int32), np.zeros([0]))
      for text in answer([row.text for row in rows], self.reader, self.tokenizer)
    ]


def inputs(
  ids: Ragged, rows: np.ndarray, reader: MaskedReader, tokenizer: Tokenizer
) -> dict[str, np.ndarray]:
  """Makes the reader's inputs for questions without a passage.

  Returns:
    reader_ids, reader_segments [B, 1, L], mask_positions [B, M].
  """
  masks = reader.max_masks
  room = packing.query_room(reader.query_length) - masks
  queries = [np.append(ids[row][:room], [tokenizer.mask_id] * masks) for row in rows]
  ends = np.array([[len(query)] for query in queries], np.int32)  # [B, 1]
  positions = packing.QUERY_START + ends - masks + np.arange(masks, dtype=np.int32)  # [B, M]
  query_ids = Ragged.of(queries, np.int32).tensor()
  packed = packing.pack_reader(
    query_ids,
    query_ids[:, :0],
    tokenizer=tokenizer,
    query_length=reader.query_length,
    length=reader.length,
  )
  return {
    "reader_ids": packed.token_ids.numpy()[:, None],
    "reader_segments": packed.segment_ids.numpy()[:, None],
    "mask_positions": positions,
  }


def answer(texts: Sequence[str], reader: MaskedReader, tokenizer: Tokenizer) -> list[str]:
  """Answers questions with the most likely word pieces up to the first [SEP], as text."""
  ids, said = Ragged.of(tokenizer(list(texts)).to_list(), np.int32), []
  for start in range(0, len(texts), _BATCH_SIZE):
    made = inputs(ids, np.arange(start, min(start + _BATCH_SIZE, len(texts))), reader, tokenizer)
    logits = reader(
      {
        "token_ids": made["reader_ids"][:, 0],
        "segment_ids": made["reader_segments"][:, 0],
        "mask_positions": made["mask_positions"],
      }
    )
    for row in np.argmax(logits, axis=-1):
      end = np.flatnonzero(row == tokenizer.sep_id)
      said.append(tokenizer.spell(row[: end[0] if len(end) else None]))
  return said

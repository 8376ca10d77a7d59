"""The jobs' commands, and a check that every runner makes what one process makes."""

import os

import numpy as np

from realm_tf.retrieval import index
from realm_tf.storage import artifacts, paths


def commands(toy, folder: str) -> list[list[str]]:
  """Every job with its flags, writing under `folder` what `toy` already has.

  `refresh_index` embeds as `embed_passages` does.
  """
  config, made = toy.config(), os.path.join(folder, "passages")
  return [
    [
      "make_passages",
      f"--input={config.corpus.knowledge}",
      f"--output={made}",
      f"--vocab={config.passages}",
      f"--max_tokens={config.corpus.max_tokens}",
    ],
    ["annotate_spans", f"--passages={made}", f"--output={os.path.join(folder, 'spans')}"],
    [
      "refresh_index",
      f"--snapshots={toy.path('ict/snapshots')}",
      f"--passages={made}",
      f"--indexes={os.path.join(folder, 'indexes')}",
      "--nojit_compile",
    ],
  ]


def check_outputs(toy, folder: str) -> None:
  """Checks that the commands made what one process makes."""
  config, made = toy.config(), os.path.join(folder, "passages")
  for got, wanted, what in (
    (made, config.passages, "passages"),
    (os.path.join(folder, "spans"), config.knowledge_spans, "spans"),
  ):
    assert files_of(got) == files_of(wanted), what
  num_rows = artifacts.read_info(made)["counts"]["passages"]
  got, wanted = (
    index.read_embeddings(found, num_rows=num_rows)
    for found in (
      artifacts.latest(os.path.join(folder, "indexes")),
      toy.path("ict/indexes/00000000"),
    )
  )
  np.testing.assert_allclose(got, wanted, atol=1e-5)


def files_of(folder: str) -> dict[str, bytes]:
  found = {}
  for path in paths.listed(folder, r".+\.arrow"):
    with open(path, "rb") as file:
      found[os.path.basename(path)] = file.read()
  return found

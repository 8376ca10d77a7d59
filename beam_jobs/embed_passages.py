"""Embeds all passages with the passage tower of a snapshot: Embed_doc(z) for every z.

    python -m beam_jobs.embed_passages --snapshot=SNAP --passages=P --output=E -- \\
        --direct_num_workers=2

REALM, section 3.3.

The output is an index. Each record file of passages becomes one file of embeddings; row i across
all of them is passage i, regardless of the order of processing and the number of workers. If
interrupted, run it again to resume: finished files are kept.

With --searcher=partitioned or scann, some sentences of the passages are embedded as queries, and
searched for exactly and with that searcher, to choose the width of its search for the wanted
--recall. The measured recall is written to info.json and printed.
"""

from collections.abc import Sequence

from absl import flags

from beam_jobs import index_flags
from realm_tf import cli

if __name__ == "__main__":
  flags.DEFINE_string("snapshot", None, "The snapshot folder to embed with.", required=True)
  flags.DEFINE_string("passages", None, "The passages folder.", required=True)
  flags.DEFINE_string("output", None, "The index folder to write.", required=True)
  index_flags.define()
  cli.start_job("beam_jobs.embed_passages")

from beam_jobs.embedding import embed


def main(argv: Sequence[str]) -> None:
  args = flags.FLAGS
  embed(
    args.output,
    snapshot=args.snapshot,
    passages_folder=args.passages,
    config=index_flags.config_of(args),
    batch_size=args.batch_size,
    jit_compile=args.jit_compile,
    beam_args=argv[1:],
  )

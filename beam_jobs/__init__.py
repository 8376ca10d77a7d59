"""Apache Beam jobs."""

import sys

from realm_tf import cli

# Beam starts its worker processes itself; they import this package when they unpickle a job's
# functions.
if any("apache_beam.runners.worker.sdk_worker" in word for word in sys.orig_argv):
  cli.set_switches()

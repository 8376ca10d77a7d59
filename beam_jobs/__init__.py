"""Apache Beam jobs; each module is a program."""

import logging

import realm_tf  # before TensorFlow is imported, for its log level

# Beam says on every start that BigQuery's client is not installed.
logging.getLogger().addFilter(lambda record: "apitools not found" not in record.getMessage())

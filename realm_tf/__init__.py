"""REALM in TensorFlow and Keras."""

import gc
import os
import sys

# TensorFlow logs its start-up in every process, as errors where there is no GPU; real errors are exceptions. Set it to 0 to see all.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Importing TensorFlow and Keras makes a million objects that stay: to look for garbage after every 700 of them takes a tenth of a start.
gc.set_threshold(50_000)


def _import_keras_alone() -> None:
  """Imports Keras as it is without scikit-learn and matplotlib; it imports both where it finds them, which takes a quarter of a start."""
  hidden = {"sklearn", "matplotlib"} - set(sys.modules)
  sys.modules.update(dict.fromkeys(hidden))  # None: not to be found
  import keras  # noqa: F401

  for name in hidden:
    del sys.modules[name]


def _is_for_client() -> bool:
  """Whether serving.client, which starts at once because it needs no Keras, is what imports this package."""
  program = getattr(sys.modules["__main__"], "__spec__", None)
  return "serving.client" in sys.modules or (program is not None and program.name == "serving.client")


if not _is_for_client():
  _import_keras_alone()

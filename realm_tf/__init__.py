"""REALM in TensorFlow and Keras."""

import gc
import os
import sys

# TensorFlow logs its start-up in every process, as errors where there is no GPU; real errors are exceptions. Set it to 0 to see all.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Importing TensorFlow and Keras makes a million objects that stay: to look for garbage after every 700 of them takes a tenth of a start.
gc.set_threshold(50_000)


def _import_keras_alone() -> None:
  """Imports Keras without scikit-learn, matplotlib and JAX, unless JAX is its backend.

  Keras imports them where it finds them. That takes a quarter of a start, and JAX's threads do not
  bear a fork.
  """
  hidden = {"sklearn", "matplotlib"} - set(sys.modules)
  if os.environ.get("KERAS_BACKEND") != "jax":
    hidden |= {"jax"} - set(sys.modules)
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

"""REALM in TensorFlow and Keras.

Example:
  import realm_tf
  system = realm_tf.load("runs/quickstart/finetune/realm")
  system.answer("who built the bridge over the Gorneth?")     # text, score, passage, offsets
  system.retrieve("rivers of the north", num=5)
  pretrained = realm_tf.load("runs/quickstart/realm")
  pretrained.fill_mask("The Gorneth flows into the sea near the port of [MASK] [MASK].")
"""

import importlib

_PUBLIC = {  # imported on first use, because they need TensorFlow and Keras
  "load": "realm_tf.systems.system",
  "System": "realm_tf.systems.system",
  "Answer": "realm_tf.systems.results",
  "Filling": "realm_tf.systems.results",
  "FoundPassage": "realm_tf.systems.results",
  "Report": "realm_tf.systems.explanations",
  "UserError": "realm_tf.errors",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str):
  if name not in _PUBLIC:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
  return sorted({*globals(), *_PUBLIC})

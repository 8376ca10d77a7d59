"""Opens the tensors of TensorFlow checkpoints, and translates their names to Hugging Face's."""

import functools
import math
import re

import numpy as np
import tensorflow as tf

from realm_tf.checkpoints import tensorflow_index
from realm_tf.checkpoints.tensor_files import (
  DAMAGED,
  SHOWN_CHARS,
  CheckpointError,
  Tensor,
  Tensors,
  stored,
)
from realm_tf.storage import paths
from realm_tf.storage.artifacts import gfile


def open_tensorflow(prefix: str) -> Tensors:
  """Opens the variables of a TensorFlow checkpoint, including TF1's.

  A checkpoint of one big variable is read a few rows at a time.

  Args:
    prefix: path of the checkpoint without ".index".

  Raises:
    CheckpointError: if it is not a checkpoint, or is damaged.
  """
  try:
    variables = tensorflow_index.read(prefix)
    reader = tf.train.load_checkpoint(paths.literal(prefix))
  except DAMAGED as error:
    raise CheckpointError(
      f"{prefix!r} is not a TensorFlow checkpoint: {str(error)[:SHOWN_CHARS]}"
    ) from error
  data = f"{prefix}.data-00000-of-00001"
  file_bytes = gfile.stat(data).length if gfile.exists(data) else 0
  if len(variables) == 1:
    ((name, (shape, dtype)),) = variables.items()
    # The file holds these values and nothing else.
    if file_bytes == math.prod(shape) * dtype.size:
      numbers = dtype.as_numpy_dtype
      return {name: stored(data, 0, shape, numbers, file_bytes=file_bytes, name=name)}

  def rows_of(name: str, start: int, stop: int) -> np.ndarray:
    return reader.get_tensor(name)[start:stop]

  return {
    name: Tensor(variable.shape, prefix, functools.partial(rows_of, name), name)
    for name, variable in variables.items()
  }


_OF_OPTIMIZERS = re.compile(
  r"(.*/)?(adam_[mv]|global_step|beta[12]_power|Adam(WeightDecayOptimizer)?(_1)?)"
)
# Keras' layer norm has an epsilon of 1e-3; BERT's own, LayerNorm, has 1e-12
KERAS_NORM = "layer_normalization"
_RENAMED = (  # TF1's names -> Hugging Face's
  (r"^(module/)*", ""),
  (r"^reader/(module/)*", "reader/"),
  (r"^(reader/)?bert/", r"\1realm/"),
  (r"^(reader/)?(dense|LayerNorm)/", r"\1cls/\2/"),
  (rf"^{KERAS_NORM}/", f"cls/{KERAS_NORM}/"),  # the projection's norm in ORQA's modules
  (r"^reader/cls/dense/", "reader/qa_outputs/dense_intermediate/"),
  (r"^reader/dense_1/", "reader/qa_outputs/dense_output/"),
  (r"^reader/layer_normalization/", "reader/qa_outputs/layer_normalization/"),
  (r"layer_(\d+)", r"layer/\1"),
  (r"_embeddings$", "_embeddings/weight"),
  (r"(kernel|gamma)$", "weight"),
  (r"(output_bias|beta)$", "bias"),
)


def with_huggingface_names(variables: Tensors) -> Tensors:
  """Returns TF1 variables of BERT and REALM under Hugging Face's names.

  The inputs have the names of Hub modules and of ORQA's model directories. Optimizer variables are
  left out, and kernels are transposed.
  """
  renamed = {}
  for name, tensor in variables.items():
    if not _OF_OPTIMIZERS.fullmatch(name):
      theirs = name
      for pattern, replacement in _RENAMED:
        theirs = re.sub(pattern, replacement, theirs)
      renamed[theirs.replace("/", ".")] = tensor.transposed if name.endswith("/kernel") else tensor
  return renamed

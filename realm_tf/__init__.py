"""REALM in TensorFlow and Keras."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow's start-up notes, from every process; set it to 0 to see them

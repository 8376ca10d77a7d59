"""REALM in TensorFlow and Keras."""

import os

# TensorFlow logs its start-up in every process, as errors where there is no GPU; real errors are exceptions. Set it to 0 to see all.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

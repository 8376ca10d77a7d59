"""REALM in TensorFlow and Keras."""

import gc
import os

# TensorFlow logs its start-up in every process, as errors where there is no GPU; real errors are exceptions. Set it to 0 to see all.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Importing TensorFlow and Keras makes a million objects that stay; looking for garbage every 700 of them takes a fifth of every start.
gc.set_threshold(50_000)

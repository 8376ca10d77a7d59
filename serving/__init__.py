"""REALM as a service: export, model server, clients."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # as in realm_tf

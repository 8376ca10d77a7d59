"""The web page; `python -m serving.web` serves it."""

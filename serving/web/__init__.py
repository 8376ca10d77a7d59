"""The web page, served by `python -m serving.web`."""

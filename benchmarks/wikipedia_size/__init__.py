"""Measures a corpus of the size of Wikipedia on one machine."""

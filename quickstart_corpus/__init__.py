"""The built-in corpus: an encyclopaedia of an invented archipelago.

It comes with texts, questions and clozes about the archipelago.
"""

"""Retrievers from raw text, compared on questions that nobody here wrote."""

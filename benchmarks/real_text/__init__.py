"""Compares retrievers trained on raw text, with independently written questions."""

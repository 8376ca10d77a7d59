"""Compares searchers on generated embeddings."""

"""REALM's entire pre-training on one accelerator: speed, memory and recall."""

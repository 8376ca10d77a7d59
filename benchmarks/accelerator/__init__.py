"""All of REALM's pre-training on one accelerator: speed, memory and recall."""

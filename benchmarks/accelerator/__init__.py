"""All of REALM's pre-training on one accelerator, from one file of packed data: speed, memory and recall."""

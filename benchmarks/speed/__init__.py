"""Times REALM's steps and embedding beside PyTorch and transformers, in turn, on this machine."""

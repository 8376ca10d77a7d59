"""Examples for all training stages: the only code that packs, masks and pads them."""

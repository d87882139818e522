"""The miniature: what stands in, on a laptop, for what the paper takes ready-made."""

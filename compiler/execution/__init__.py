"""Running any stage on token sequences."""

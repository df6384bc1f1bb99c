"""Rules of legalize-inductor."""

"""What a destination can run, and refusals that name the nearest that works."""

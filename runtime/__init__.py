"""Sessions over artifacts, generation and measurement."""

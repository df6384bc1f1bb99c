"""One rewrite per file."""

"""One output format per folder."""

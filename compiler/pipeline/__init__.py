"""A recipe of passes, run, verified, gated and resumed."""

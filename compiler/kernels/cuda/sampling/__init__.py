"""Choice of the next token in Triton: one launch for all rows of a batch."""

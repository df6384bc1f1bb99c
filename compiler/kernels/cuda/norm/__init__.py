"""A norm of each row, a factor and a residual in one launch."""

"""Paged attention in Triton: one token per request (`decode`), several (`prefill`), and what both share."""

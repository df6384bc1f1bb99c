"""Speculative decoding: drafters, and the acceptance of what they draft."""

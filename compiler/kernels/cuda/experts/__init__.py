"""Experts of tokens: gate and up, then the weighted sum of what they make, over the chosen ones alone."""

"""Symbolic proof of what an attention mask lets through."""

"""Rewrites that give a program a KV cache, or store it in fewer bits."""

"""Rows of an embedding, or of activations, by their indices."""

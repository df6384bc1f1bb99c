"""The token sequences that statistics of activations are taken from."""

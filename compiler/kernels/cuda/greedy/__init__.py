"""The end of a greedy decode step: largest logits, and the inputs of the next step."""

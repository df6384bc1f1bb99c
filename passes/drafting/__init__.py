"""What a program gives beside its logits, for drafting the next tokens."""

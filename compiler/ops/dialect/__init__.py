"""The operators that passes reason about."""

"""Implementations of ops of the dialect, one folder per device."""

"""Rewrites that find whole operators in spelled-out graphs."""

"""Rewrites into what an engine has operators for."""

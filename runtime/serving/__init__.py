"""Serving: requests of many clients, run together by one engine."""

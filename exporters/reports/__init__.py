"""The HTML report of an artifact."""

"""Quality and speed of an artifact."""

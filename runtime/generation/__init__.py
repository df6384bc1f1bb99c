"""From text to text over a session."""

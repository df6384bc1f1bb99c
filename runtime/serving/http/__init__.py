"""The OpenAI-compatible server: what clients may ask, and the processes that answer them."""

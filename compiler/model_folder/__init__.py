"""What a Hugging Face folder holds, checked before anything is parsed."""

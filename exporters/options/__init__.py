"""What each target lets its users choose, one struct per target. Nothing here imports torch: help of commands reads it."""

"""What a round of drafts does beside its products."""

"""Programs on disk, without pickle; every file is read as hostile."""

"""Program, dialect, capture, pipeline, rewriting, artifact and diagnostics: the ground floor."""

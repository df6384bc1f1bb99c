"""Rules of legalize-ort."""

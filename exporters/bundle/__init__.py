"""Deployment folders: an artifact with a C++ program that decodes with it, for hosts without Python."""

from optc.exporters.bundle.write import Bundle, write_bundle

__all__ = ["Bundle", "write_bundle"]

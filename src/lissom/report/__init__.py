"""The page and the pictures about one compressed checkpoint."""

from .html import remember, write_report

__all__ = ["remember", "write_report"]

"""The only orchestration: recipes, plans, runs."""

from .recipe import read, shipped

__all__ = ["read", "shipped"]

"""The only orchestration: recipes, plans, runs."""

from .compress import compress, plan
from .look import inspect
from .planning import Plan
from .recipe import Recipe, names, read, shipped

__all__ = ["Plan", "Recipe", "compress", "inspect", "names", "plan", "read", "shipped"]

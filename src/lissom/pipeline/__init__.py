"""The only orchestration: recipes, plans, runs."""

from .compress import compress, plan
from .convert import convert
from .look import inspect
from .planning import Plan
from .recipe import Recipe, names, read, shipped
from .sizing import expectation

__all__ = ["Plan", "Recipe", "compress", "convert", "expectation", "inspect", "names", "plan", "read", "shipped"]

"""lissom makes large language models smaller and faster, and says honestly what that cost."""

__version__ = "0.1.0"

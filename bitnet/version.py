"""The version, where every room may read it: bitnet/__init__.py imports all of them, and none imports it."""

__version__ = "0.1.0"

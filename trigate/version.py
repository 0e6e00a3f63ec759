"""The version of Trigate."""

__version__ = "0.1.0"

"""The version of glmd, in a file of its own: everything may say it, and it imports nothing."""

__version__ = "0.2.0"

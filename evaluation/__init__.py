"""The evaluation runner, a program of its own: `python -m evaluation`."""
__version__ = "0.1.0"

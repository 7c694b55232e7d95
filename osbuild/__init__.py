"""osbuilder: an ordinary Docker image in, a guest that boots out."""

__version__ = "0.1.0"

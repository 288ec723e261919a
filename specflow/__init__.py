"""specflow: train, export and honestly benchmark speculative-decoding draft models as a declarative pipeline."""

__version__ = "0.1.0"

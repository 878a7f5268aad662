"""The paper's experiments in small: ``python -m paper``."""

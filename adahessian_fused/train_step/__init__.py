"""A training step as one compiled, and on CUDA captured, call."""

from .step import TrainStep

__all__ = ["TrainStep"]

"""Array kernels shared by the NumPy and JAX paths; this folder imports nothing of the package."""

from .median import median_filter

__all__ = ["median_filter"]

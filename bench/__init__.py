"""Benchmarks: every figure is measured beside its peers in the same run, after its result was checked.

``make bench``, ``python -m adahessian_fused bench`` or, in a source tree, ``python -m bench.run``.
"""

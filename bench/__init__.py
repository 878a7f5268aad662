"""Benchmarks: every figure is measured beside its peers in the same run, after its result was checked."""

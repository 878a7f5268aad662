"""What second-order steps cost beside first-order ones: the paper's Table 6, extended. ``python -m bench.overhead``."""

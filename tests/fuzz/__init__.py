"""Random cases of what users do, against an oracle that shares nothing with the package: ``make fuzz``.

Each module has ``case(seed)``, which draws everything from the seed and raises AssertionError where a step is wrong.
"""

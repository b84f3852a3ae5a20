"""Benchmarks: ``python -m benchmarks.speed.run`` and ``python -m benchmarks.speed.scaling``."""

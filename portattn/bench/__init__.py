"""Measurements: behind `portattn demo` and the scripts in benchmarks/."""

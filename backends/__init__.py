"""How a plan runs: one folder per backend, one table in registry.py."""

"""Eager torch in float64: what every other backend is compared with."""

"""Compiled loops of the replay; loaded lazily, as numba takes a quarter of a second."""

"""Sweeps: many cases, kept as they finish."""

"""Solvers of cache plans."""

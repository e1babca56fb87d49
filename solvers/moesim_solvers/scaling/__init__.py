"""Solvers of scaling plans."""

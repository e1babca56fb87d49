"""Placement solvers: one file each."""

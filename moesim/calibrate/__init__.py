"""Fits cost parameters to tables of measurements, the reader's own or published ones."""

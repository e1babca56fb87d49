"""The demonstration: a small real model through the whole chain."""

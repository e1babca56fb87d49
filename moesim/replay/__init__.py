"""Replay of expert caches: one layer of one step is one event."""

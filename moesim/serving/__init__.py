"""Serving: requests, batches and key-value memory over time."""

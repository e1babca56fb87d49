"""Benchmarks of what users wait for. `make bench` runs each in a process of its own and writes `.bench/results.json`."""

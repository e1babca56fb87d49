"""First-party solvers of moesim; found through entry points, like anybody's."""

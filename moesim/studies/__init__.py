"""Studies: reports that one command makes from simulations, never by hand."""

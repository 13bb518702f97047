"""One page about a stack: its machine, plan and measurements, readable without a network."""

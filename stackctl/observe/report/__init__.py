"""An HTML page about a stack: its machine, plan and measurements, without external resources."""

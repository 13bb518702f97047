"""Observation of running stacks: status, checks, metrics, diagnosis, benchmarks. It only reads."""

"""Frozen values that flow through stackctl; each round-trips through JSON."""

"""Measurement of a running stack as a client sees it, and comparison of two measurements."""

"""Measures a running stack as a client does, and says what differs between two measurements."""

"""From facts to a plan: pure functions of host, model, profile and engine facts."""

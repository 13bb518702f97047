"""Health of an endpoint, and tests of its completions."""

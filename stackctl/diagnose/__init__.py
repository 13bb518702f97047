"""Pure rules: the causes of slow requests, and differences of a running stack from its plan."""

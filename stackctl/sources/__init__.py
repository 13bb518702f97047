"""Where profiles and models are read from."""

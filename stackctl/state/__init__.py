"""State on disk: generations of stacks, the journal, keys, measurements, facts of images."""

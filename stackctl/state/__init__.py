"""What stackctl remembers: generations of stacks, and facts read from images."""

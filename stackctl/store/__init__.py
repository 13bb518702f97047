"""Models on disk: fetched, verified, pinned, shared with other tools, carried elsewhere."""

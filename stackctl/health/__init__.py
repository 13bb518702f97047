"""Is it alive, does it answer, is the answer one."""

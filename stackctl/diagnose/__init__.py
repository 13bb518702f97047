"""Pure: from what was seen to findings."""

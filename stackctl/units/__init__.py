"""From a plan to the text of Quadlet units."""

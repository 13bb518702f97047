"""What runs, seen from outside: reads only."""

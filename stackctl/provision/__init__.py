"""Preparation of a machine: plan the missing changes, make them, and undo them."""

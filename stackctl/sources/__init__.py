"""Readers of profiles and of the facts of models."""

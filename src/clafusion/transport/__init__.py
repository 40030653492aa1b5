"""Optimal transport: cost matrices -> plans."""

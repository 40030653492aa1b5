"""Restore what averaging destroys, in closed form."""

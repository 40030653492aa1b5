"""Which channels of a source become which channels of the target: costs, masses, plans."""

"""Which layers of two networks belong together: layer costs and the dynamic program."""

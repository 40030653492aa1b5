"""Tables, pictures and pages of results. Nothing imports this package but the command line."""

"""Module -> TracedModel: what one network is. Knows nothing of any other network."""

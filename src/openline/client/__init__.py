"""A client whose conversation survives a bad network."""

"""A turn: its log, its run, the registry that owns its task."""

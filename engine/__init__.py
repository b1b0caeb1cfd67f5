"""What keeps a run alive and fast; a first-time reader may skip it."""

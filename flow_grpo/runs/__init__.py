"""A run on disk: its folder, its lock, what it has saved, and how it is asked to stop."""

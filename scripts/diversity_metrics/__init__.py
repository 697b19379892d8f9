"""Commands that measure diversity."""

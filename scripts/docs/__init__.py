"""Commands that make pages of docs/."""

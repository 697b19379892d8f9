"""Recipes: base.py declares every key, the others change what a recipe changes."""

"""Recipes: base.py declares every key, grpo.py changes what a recipe changes."""

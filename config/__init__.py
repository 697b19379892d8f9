"""The names that --config takes: base.py and grpo.py hand over the recipes of flow_grpo/recipes."""

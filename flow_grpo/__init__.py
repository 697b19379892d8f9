"""Reward fine-tuning of flow-matching text-to-image models, with its diversity measured."""

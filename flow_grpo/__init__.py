"""Reward fine-tuning of flow-matching text-to-image models, with its diversity measured."""

import logging

# Where it is installed, diffusers imports it, and on some CPUs it says what it lacks for 4-bit weights, which none are.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

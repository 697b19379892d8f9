"""The Vendi score, written in flow_grpo/diversity/vendi.py; diversity_evaluator.py measures folders and checkpoints."""

from flow_grpo.diversity.vendi import vendi_score

__all__ = ["vendi_score"]

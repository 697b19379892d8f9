"""RKE, written in flow_grpo/diversity/rke.py; diversity_evaluator.py measures folders and checkpoints."""

from flow_grpo.diversity.rke import median_bandwidth, relative_rke, rke_score

__all__ = ["median_bandwidth", "relative_rke", "rke_score"]

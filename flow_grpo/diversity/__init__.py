"""The diversity of images, measured in features: pure functions of arrays, and the encoders that make features."""

from flow_grpo.diversity.bootstrap import RkeScore, VendiScore, grouped_interval
from flow_grpo.diversity.rke import median_bandwidth, relative_rke, rke_score
from flow_grpo.diversity.vendi import vendi_score
from flow_grpo.statistics import Interval

__all__ = [
    "Interval",
    "RkeScore",
    "VendiScore",
    "grouped_interval",
    "median_bandwidth",
    "relative_rke",
    "rke_score",
    "vendi_score",
]

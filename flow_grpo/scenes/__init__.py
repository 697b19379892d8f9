"""Scenes: up to four garments on a grid of 2 x 2 cells, and captions of GenEval's six kinds. Torch is not imported."""

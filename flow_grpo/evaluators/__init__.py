"""Evaluators: each measures the samples of one evaluation, drawn once and shared by all."""

"""The sampler: one affine step, its log-probability, and the rollout."""

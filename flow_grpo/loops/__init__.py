"""The loops of the methods: an epoch of sampling, scoring and updating, each for a family of methods."""

"""What made the scenes of assets/: the data, the tiny model, its detectors."""

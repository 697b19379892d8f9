"""What is a model family's own, and files of models."""

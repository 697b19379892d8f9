"""What made assets/."""

"""The demo, and reports from run folders."""

"""The commands that `pip install` gives: parse, call, print."""

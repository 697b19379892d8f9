"""The tests; conftest.py makes the random tiny models they share."""

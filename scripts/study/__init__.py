"""The study, from its plan to its page; and the demo, put into the README."""

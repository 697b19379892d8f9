"""The two ways a run ends early with one sentence instead of a traceback."""


class ConfigError(ValueError):
    """Bad input, found before any model loads: names the key, its value and what is allowed (exit code 2)."""


class TrainingStopped(RuntimeError):
    """Training cannot go on; what was saved is intact (exit code 1)."""

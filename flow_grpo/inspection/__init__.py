"""What `fme check` and `fme sample` look at: found out by looking, settled, drawn, compared."""

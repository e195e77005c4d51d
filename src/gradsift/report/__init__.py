"""Reports of runs and sweeps: on the terminal, as files, and as an HTML page."""

"""Environment servers: their rows, what to start for one, and how it runs as containers or processes."""

"""Docker: the one door to it, and what is decided before it is asked."""

"""A model's server for as long as a run needs it, in a container or as a process."""

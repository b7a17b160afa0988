"""Training runs: presets, example scripts, the rules that a run must keep, and how one is started."""

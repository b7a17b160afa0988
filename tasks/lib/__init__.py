"""What the tasks share: settings and the running of programs."""

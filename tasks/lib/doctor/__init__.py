"""What `invoke doctor` looks at."""

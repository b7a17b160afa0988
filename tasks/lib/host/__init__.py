"""This machine: its processes, programs and what Python leaves on it."""

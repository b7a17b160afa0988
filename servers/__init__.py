"""Programs that run beside or inside an environment server; they import nothing from the other wings."""

"""What the other rooms stand on: imports of optional packages, random states, objects by name."""

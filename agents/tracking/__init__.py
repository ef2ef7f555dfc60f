"""What a run writes down: its folder, and who else is told."""

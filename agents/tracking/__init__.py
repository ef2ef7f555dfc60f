"""What a run writes: its folder, its rows, and the trackers that receive them too."""

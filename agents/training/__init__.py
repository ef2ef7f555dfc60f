"""Runs: their configuration, the loop over the phases, checkpoints and the summary."""

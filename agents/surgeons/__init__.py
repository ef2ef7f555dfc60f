"""Surgeons: agents that choose the operations."""

"""The embedded corpus: a seeded grammar that writes an endless play."""

from avatarl_env.text.playwright.writer import SHA256, Play, write_play

__all__ = ["SHA256", "Play", "write_play"]

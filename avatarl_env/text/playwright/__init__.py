"""The embedded corpus: a seeded grammar that writes an endless play."""

from avatarl_env.text.playwright.writer import Play, write_play

__all__ = ["Play", "write_play"]

"""Text: corpora, the embedded play, the n-gram reference."""

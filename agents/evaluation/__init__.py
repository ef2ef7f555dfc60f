"""How well the language model predicts, and what operations are worth."""

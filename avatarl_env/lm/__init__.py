"""The language model: network, cached sampling, character tokenizer."""

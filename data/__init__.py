"""Datasets, one folder each, and the code that they share: token files and tokenizers."""

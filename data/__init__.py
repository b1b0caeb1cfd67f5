"""Datasets, one folder each, and the code that they share: documents, token files, tokenizers."""

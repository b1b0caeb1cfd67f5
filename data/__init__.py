"""Datasets, one folder each, and their shared code: token files, documents, tokenizers."""

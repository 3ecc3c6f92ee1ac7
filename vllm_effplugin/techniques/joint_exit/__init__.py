"""Jointly learned exits and inference for classification: JEI-DNN (arXiv 2310.09163)."""

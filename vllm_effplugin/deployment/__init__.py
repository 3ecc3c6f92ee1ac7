"""Prepared checkpoints on more than one machine."""

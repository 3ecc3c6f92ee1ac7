"""Thin vLLM model classes that execute a plan."""

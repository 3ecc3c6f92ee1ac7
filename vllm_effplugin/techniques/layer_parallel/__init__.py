"""CQIL: concurrent quasi-independent layers (ACL 2024, arXiv 2404.06709)."""

"""CE-CoLLM (arXiv 2411.02829): an edge that answers alone, and a cloud for the tokens it is unsure
of.
"""

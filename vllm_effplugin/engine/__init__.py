"""All that knows vLLM's internals, in one place. `contract.py` lists each interface by name."""

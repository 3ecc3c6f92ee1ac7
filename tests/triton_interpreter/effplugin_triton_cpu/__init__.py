"""Triton's CPU backend, as far as vLLM asks for it: for kernels that Triton only interprets.

vLLM's runner V2 needs Triton, and on a CPU it needs a backend `cpu`, which no package index has.
With TRITON_INTERPRET=1 kernels are interpreted and no backend compiles anything, so this one only
has to be found (entry point `triton.backends`), by a process that has this folder in PYTHONPATH.
"""

"""Early exit (DYNAMAX): tokens leave the stack when a gate is sure of them."""

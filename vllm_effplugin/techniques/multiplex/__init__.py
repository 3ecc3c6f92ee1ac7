"""RevMUX (arXiv 2410.04519): several sequences run the upper layers as one."""

"""One folder per technique: its configuration, layers, reference, preparation and training."""

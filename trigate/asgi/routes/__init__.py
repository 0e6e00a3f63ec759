"""The control plane: one Quart blueprint for each group of paths. Each view calls a service."""

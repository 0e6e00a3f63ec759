"""The control plane: one Quart blueprint for each group of paths. Each view is thin; the work is done by a service."""

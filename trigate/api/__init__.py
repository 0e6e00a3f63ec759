"""The control plane: thin Quart blueprints over what the gateway knows."""

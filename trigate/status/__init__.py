"""What the gateway reports of itself."""

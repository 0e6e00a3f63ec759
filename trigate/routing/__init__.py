"""Which target serves a call, in which order, and what is known of each target. Pure."""

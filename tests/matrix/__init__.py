"""Every format of clients over every format of upstreams: one scene after the other, streamed and not."""

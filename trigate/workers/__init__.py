"""The other worker processes of this gateway: membership and notifications."""

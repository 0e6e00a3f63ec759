"""OpenAI's wire format, as far as the gateway acts on it. Pure: no clock, no socket, no await."""

"""Chat platforms: messages come in from Telegram and Slack, and replies go out to them.

Read `service` first (which channels run, and what happens when one fails), then `adapter` (what a platform implements,
and what it gets) and `delivery` (how a final reply is written). Each platform has its own package, which is imported
only when a channel of that platform is configured.

The package knows runs, the outbox and the store. It must not know HTTP routes, exchanges or the gateway.
"""

from trigate.channels.adapter import Adapter, ChannelState
from trigate.channels.service import Channels, ChannelStatistics, open_channels

__all__ = ["Adapter", "ChannelState", "ChannelStatistics", "Channels", "open_channels"]

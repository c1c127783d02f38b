"""The demo: what `onlinespec demo` plays, measures and shows."""

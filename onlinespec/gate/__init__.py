"""Decides when a candidate replaces the incumbent. Pure: no files, no clock, no sockets, no torch."""

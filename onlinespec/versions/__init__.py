"""Versions of the draft on disk: the store, their manifests, and the journal of what was in service."""

"""Captured rows on disk, where somebody asked for it: shards with a manifest, written by the sidecar, read offline."""

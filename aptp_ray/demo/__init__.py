"""The embedded demo: OpenMoji scenes with captions, drawn on the spot."""

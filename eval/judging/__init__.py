"""Judges images, and scores the answers."""

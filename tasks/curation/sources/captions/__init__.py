"""Reads captions next to images, and assigns them to images."""

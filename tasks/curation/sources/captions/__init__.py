"""Reads captions beside images, and assigns them to images."""

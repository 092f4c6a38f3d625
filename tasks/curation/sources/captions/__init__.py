"""Captions beside images: how they are written, and which image each belongs to."""

"""Deciding what becomes of each record, as SQL over columns of scores: no image is read."""

"""Scoring: every record is decoded once and gets columns; nothing is decided."""

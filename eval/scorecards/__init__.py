"""Scorecards: their schema, how they are made, drawn and compared."""

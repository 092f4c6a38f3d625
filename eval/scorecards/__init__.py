"""Scorecards: schema, creation, drawing and comparison."""

"""The report of a curation and its counts."""

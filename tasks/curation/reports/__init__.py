"""The report of a curation, and the counts that it shows."""

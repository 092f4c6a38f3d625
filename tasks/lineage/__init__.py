"""Pages and queries over the lineage of artifacts; tasks.trace is the command."""

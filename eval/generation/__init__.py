"""Images of a benchmark's prompts, from any diffusers pipeline."""

"""Text: the frozen encoder, prompts, and the texts that all stages share."""

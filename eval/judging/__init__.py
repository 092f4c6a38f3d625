"""From images to answers, and from answers to scores."""

"""Training: phases, loop, losses, self-synthesis. Nothing here is needed to score."""

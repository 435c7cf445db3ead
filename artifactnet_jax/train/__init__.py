"""Training: data, phases, loop, teachers, self-synthesis. Nothing here is needed to score."""

"""The training loop: steps, epochs, several processes, and what a run writes."""

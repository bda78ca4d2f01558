"""One module per library whose checkpoints can be imported, each with the parts that ``Library`` names."""

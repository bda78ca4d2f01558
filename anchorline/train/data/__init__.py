"""From labelled images to training batches on the canvas."""

"""The training stage: the PyTorch model, its losses, its data and the training loop."""

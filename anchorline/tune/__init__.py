"""The verb ``tune``: a model's fastest settings on this machine that keep its accuracy."""

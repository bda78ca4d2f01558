"""The model: backbones, RPN, RoI heads, their targets and losses, and the settings of all of it."""

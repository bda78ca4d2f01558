"""What runs a network on a processor, how it uses the cores, and the choice between them."""

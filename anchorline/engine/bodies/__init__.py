"""Function bodies of the custom ops for TensorRT, in place of those in the exported file."""

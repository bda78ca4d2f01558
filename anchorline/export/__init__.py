"""The export stage: from a checkpoint to one ONNX file, checked against the model it came from."""

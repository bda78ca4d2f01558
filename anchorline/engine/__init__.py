"""The engine stage: from the ONNX file to a TensorRT engine. Never imports PyTorch."""

"""Conversion between ONNX graphs and weights files."""

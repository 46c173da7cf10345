"""Publish an artifact with its manifest, ONNX twin and exhibits; recalibrate a published model."""

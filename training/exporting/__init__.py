"""Exports: a published model as files for ONNX Runtime, for `torch.export`, and for Triton."""

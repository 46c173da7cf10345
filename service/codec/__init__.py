"""Bytes to arrays and back: JSON, application/x-npy, application/x-safetensors, image/png."""

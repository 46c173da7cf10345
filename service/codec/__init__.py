"""Bytes to arrays and back: JSON, application/x-npy, image/png."""

"""Serve trained models over HTTP. From `models`, this package uses the artifact format and the errors only."""

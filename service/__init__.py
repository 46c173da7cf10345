"""Artifact in, HTTP out: serves frozen models. Of `models` it knows the artifact contract alone."""

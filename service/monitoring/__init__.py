"""Metrics, logs, drift detection and alerts."""

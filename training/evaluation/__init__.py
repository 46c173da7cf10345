"""Evaluate models: metrics, model selection, and scores of a table."""

"""Training: from a table to a published artifact."""

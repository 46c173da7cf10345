"""Adopt trained networks: from a module, a scaler and normal rows to a published artifact."""

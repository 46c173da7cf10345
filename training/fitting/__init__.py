"""Fit models: PCA, networks, the training loop, score statistics and calibration."""

"""The models: networks, likelihoods, anomaly scores, calibration, and the artifact file that holds them."""

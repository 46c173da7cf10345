"""What is learnt: networks, likelihoods, scores, calibration, and the artifact that holds them."""

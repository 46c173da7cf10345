"""From arrays to fitted parameters: PCA, networks, objectives, the training loop, score statistics."""

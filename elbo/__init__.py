"""Train and serve autoencoders, variational autoencoders and PCA."""

"""Models at work: the registry, the batcher, the backends, calibration and sampling."""

"""Load and run models: the registry, the batcher, the backends, calibration and sampling."""

"""From data to artifact: readers, objectives, the fit, calibration, evaluation."""

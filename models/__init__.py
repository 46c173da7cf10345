"""The models: networks, likelihoods, anomaly scores, calibration, and the artifact file that holds them."""

import os

# Otherwise ONNX Runtime sends data about its use to Microsoft. It reads this variable once, when it is imported, so the
# variable is set here: `elbo`, `service` and `training` all import this package before any other.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

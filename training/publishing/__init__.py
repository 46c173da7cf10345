"""Write the artifact: manifest, ONNX twin, exhibits; recalibrate a published model."""

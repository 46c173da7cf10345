"""From the rows of a request to verdicts: inputs, decisions, smoothing over time, alignment of samples."""

"""Turn the rows of a request into verdicts: parse rows, align samples, smooth severities over time, decide verdicts."""

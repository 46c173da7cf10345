"""Turn the rows of a request into verdicts: parse rows, align samples, decide verdicts, smooth them over time."""

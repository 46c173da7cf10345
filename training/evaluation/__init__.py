"""How good a model is: metrics, model selection, scores of a table."""

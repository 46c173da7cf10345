"""Reports of a finished run: model card, plots and history."""

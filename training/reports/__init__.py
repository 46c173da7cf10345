"""What people read after a run: model card, plots, history."""

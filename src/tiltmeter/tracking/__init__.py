"""Watching a fine-tune while it runs: measured rows, alarm, path of the weights."""

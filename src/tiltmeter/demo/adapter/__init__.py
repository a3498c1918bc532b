"""The safety adapter of the demo: its weights, its card, the rows it was trained on and how it is measured."""

"""Predict, watch and prevent the collapse of safety alignment when an open-weight language model is fine-tuned."""

__version__ = "0.1.0"

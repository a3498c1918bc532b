"""Guards: what keeps the safety of a model while it is fine-tuned. One contract, one method a file."""

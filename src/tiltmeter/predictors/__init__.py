"""What else could tell the risk beforehand: one method a file, one contract, every rival and null beside ours."""

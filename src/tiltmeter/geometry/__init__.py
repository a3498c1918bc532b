"""The mathematics of alignment loss on flat parameter vectors; knows nothing of tokens or files."""

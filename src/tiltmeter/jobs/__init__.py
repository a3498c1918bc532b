"""One verb a file; each takes plain inputs and returns one frozen result."""

"""Detection of hung processes by a small program that runs next to each."""

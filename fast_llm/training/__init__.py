"""The training loop, and what it logs, saves and checks."""

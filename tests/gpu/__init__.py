"""The recipe and every kernel on real GPUs; `python -m tests.gpu` prints one table (see __main__.py)."""

"""Reliability campaigns: hundreds of injected faults, each campaign with a seed and a budget.

    python -m tests.faults.kills --budget 500 --seed 0

Each campaign is a function `campaign(folder, budget, seed)`. It returns its figures, and raises
AssertionError for any broken promise of docs/reliability.md, with what is needed to repeat it.
pytest runs each with a small budget.
"""

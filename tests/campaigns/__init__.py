"""Reliability campaigns: faults by the hundred, each with a seed, a budget and a table at its end.

    python -m tests.campaigns.kills --budget 500 --seed 0

Each is a function `campaign(folder, budget, seed)` that returns its figures and raises
AssertionError, with what is needed to repeat it, for anything that docs/reliability.md promises and
does not hold. pytest runs each with a small budget.
"""

"""Stands before the package on the path, so that importing it fails as if it were not installed."""

raise ImportError("hidden by the suite")

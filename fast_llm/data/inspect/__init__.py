"""What data holds, before a run is trained on it: `fast-llm inspect`."""

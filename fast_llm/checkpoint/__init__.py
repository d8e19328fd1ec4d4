"""Folders that are complete or absent: training state, Hugging Face models, exports."""

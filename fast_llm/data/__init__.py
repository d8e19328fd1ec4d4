"""From documents to token files, and from token files to batches."""

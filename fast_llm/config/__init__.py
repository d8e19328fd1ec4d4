"""What a user writes: YAML and overrides, read into sections that are checked. No torch."""

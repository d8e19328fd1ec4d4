"""The same model over many devices: one file for each dimension, applied from outside."""

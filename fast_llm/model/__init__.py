"""The model as if there were one device: layers, decoder, loss."""

"""The model in PyTorch, for one device: layers, decoder, loss.

`models/` describes each family (config.json, shapes, FLOPs) without torch; `config/model.py` has
the settings.
"""

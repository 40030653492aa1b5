"""Weights in files and modules: state dicts, safetensors, factories, digests, atomic writes.

Nothing here knows of data or of traced models.
"""

"""Weights in files and modules: state dicts, safetensors, factories, digests, atomic writes."""

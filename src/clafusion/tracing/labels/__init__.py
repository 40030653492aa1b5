"""Run an exported graph on labels instead of numbers: which channels move together."""

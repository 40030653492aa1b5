"""Run an exported graph on labels instead of numbers, to see which channels move together."""

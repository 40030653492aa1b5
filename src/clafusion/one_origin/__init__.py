"""Models that were trained from one base -> one model, by their task vectors."""

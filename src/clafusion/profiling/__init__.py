"""Data -> batches -> ModelProfile: what one network does."""

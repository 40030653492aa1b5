"""Many pairs of models: scheduler, workers, store, processes."""

"""Which structure the result gets."""

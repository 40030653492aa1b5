"""A layer map -> what corresponds in a source network and the target."""

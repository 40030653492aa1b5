"""FusionProblem -> the weighted mean of its parents."""

"""Paired comparisons: the same seeds in every arm, a plan before the first run, intervals."""

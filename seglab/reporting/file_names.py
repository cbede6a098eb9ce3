"""Names of the files that a run leaves for its report."""

SCALE_REPORT = "scale_equalization.json"  # written by the callback, which has no part in seglab
COUNTS = "counts.npz"
EXTREMES = "extremes.json"

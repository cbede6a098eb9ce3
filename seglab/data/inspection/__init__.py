"""Look at a data set before training on it: `doctor` and `browse`."""

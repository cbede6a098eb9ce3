"""Scale equalization."""

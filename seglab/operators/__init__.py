"""Exact operators that never make the full-size map: fusion, loss and argmax of what is resized."""

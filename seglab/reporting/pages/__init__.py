"""Pages about runs that have ended: an HTML report, comparisons, a model card."""

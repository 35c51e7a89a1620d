"""The report of a run: one page, its figures and its tables."""

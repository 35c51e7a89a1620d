"""Sweeps: one file names the runs to compare, the table and figure to make of them, and the paper's own numbers."""

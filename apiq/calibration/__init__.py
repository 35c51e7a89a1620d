"""Text and the token windows drawn from it: what activations are preserved on, and what perplexity is measured on.

`corpora` reads text (files, hub data sets by name, the demo corpus), `windows` turns it into token windows, `leakage`
keeps calibration and evaluation apart and `store` holds the windows on disk.
"""

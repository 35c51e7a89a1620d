"""End to end, against the full-precision model: adapters and scales are trained while the codes stay."""

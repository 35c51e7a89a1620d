"""Training of the adapters on the frozen, packed model."""

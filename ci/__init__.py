"""What guards the project besides its tests."""

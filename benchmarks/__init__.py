"""Measurements of quality, time and memory; nothing here is asserted in tests."""

"""Compress two-stage detectors with NORTON, then train, evaluate, export and run them."""

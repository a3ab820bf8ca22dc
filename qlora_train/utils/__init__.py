"""Errors, files, signals, devices: used by every stage."""

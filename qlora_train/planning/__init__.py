"""Disk space and data of a run, before it starts."""

"""Faults on purpose against real runs: kills, full disks, damage and signals, and what became of the weights."""

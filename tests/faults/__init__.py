"""Fault injection into real runs: kills, full disks, damage and signals."""

"""Attention over packed documents: each attends to itself alone."""

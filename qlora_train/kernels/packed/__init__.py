"""Attention over packed documents: each attends to itself and its shared prefix."""

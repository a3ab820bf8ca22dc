"""Held-out loss, generated answers and their scores."""

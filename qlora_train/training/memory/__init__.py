"""GPU memory of a run: probe, fallbacks, activation checkpointing and offloading."""

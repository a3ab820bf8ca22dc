"""What becomes of a finished run: merged 16-bit weights, their proof, and model cards."""

"""What becomes of a finished run: adapter check, model cards, merged weights, GGUF, vLLM, the Hub."""

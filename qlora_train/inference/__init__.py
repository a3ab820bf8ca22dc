"""Use a finished run: chat, held-out answers, public benchmarks."""

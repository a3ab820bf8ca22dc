"""report.html: one page about a run, or about several side by side, from the files of the run folders alone; no torch."""

"""What a run will take, before it starts: memory, disk space, data."""

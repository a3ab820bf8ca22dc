"""What the keys of other trainers are here: one table per trainer, read by config errors and by `qlora-train convert`."""

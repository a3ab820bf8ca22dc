"""What this machine can do, checked part by part; the last check is a real run. Imports torch when a check needs it."""

from qlora_train.doctor.machine_check import Check, run_checks

__all__ = ["Check", "run_checks"]

"""The configuration of a run: read from YAML with line numbers, checked as a whole, without torch."""

from qlora_train.config.reader import load_config, load_run_config
from qlora_train.config.schema import (
    DataSection,
    ExportSection,
    LoraSection,
    ModelSection,
    QuantizationSection,
    RunConfig,
    RunSection,
    Source,
    TrainSection,
)

__all__ = [
    "load_config", "load_run_config", "RunConfig", "ModelSection", "QuantizationSection", "LoraSection",
    "DataSection", "Source", "TrainSection", "RunSection", "ExportSection",
]  # fmt: skip

"""The table of objectives beside the documentation of their settings and the defaults of TRL."""

import dataclasses
import re

import pytest
from trl import DPOConfig
from trl.experimental.cpo import CPOConfig
from trl.experimental.orpo import ORPOConfig

from qlora_train.config.objectives import OBJECTIVES, ObjectiveRow
from qlora_train.config.schema import TrainSection

PAIR_OBJECTIVES = [row for row in OBJECTIVES.values() if row.dataset_type == "preference"]
TRL_CONFIGS = {"simpo": CPOConfig, "cpo": CPOConfig, "orpo": ORPOConfig}
OWN_DEFAULTS = {("exo_pair", "label_smoothing"), ("simpo", "sft_weight"), ("orpo", "sft_weight")}
"""The EXO paper's, since TRL refuses its own 0; SimPO's, without the term of CPO; ORPO's, where it is no setting."""


@pytest.mark.parametrize("name", dict.fromkeys(name for row in PAIR_OBJECTIVES for name in row.defaults))
def test_documentation_names_readers_and_defaults_of_a_setting(name: str) -> None:
    text = TrainSection.model_fields[name].description
    assert text is not None
    readers = [row for row in PAIR_OBJECTIVES if name in row.defaults]
    unset = re.search(r"\((\S+)\s+if\s+unset(.*?)\)", text, re.DOTALL)
    assert unset, text
    for row in readers:
        if len(readers) < len(PAIR_OBJECTIVES):
            assert f"`{row.name}`" in text
        if row.defaults[name] != float(unset[1]):
            default = re.search(rf"([\d.]+) for [^)]*`{row.name}`", unset[2])
            assert default, f"{row.name}: {text}"
            assert float(default[1]) == row.defaults[name]


@pytest.mark.parametrize("row", PAIR_OBJECTIVES, ids=lambda row: row.name)
def test_defaults_are_those_of_trl(row: ObjectiveRow) -> None:
    config = TRL_CONFIGS.get(row.name, DPOConfig)
    theirs = {field.name: field.default for field in dataclasses.fields(config)}
    theirs["sft_weight"] = theirs.get("cpo_alpha", 0.0)
    for name, default in row.defaults.items():
        if (row.name, name) not in OWN_DEFAULTS:
            assert default == theirs[name], name

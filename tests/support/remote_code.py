"""Pico models with remote code."""

import json
from pathlib import Path

TRUSTED = ("model.trust_remote_code=true",)


REMOTE_CODE = {
    "configuration_own.py": """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own_llama"
""",
    "modeling_own.py": """
from transformers import LlamaForCausalLM

from .configuration_own import OwnConfig

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
""",
}


def with_remote_code(base: Path) -> Path:
    """Add remote code to a pico Llama folder, and return the folder."""
    for name, code in REMOTE_CODE.items():
        (base / name).write_text(code)
    values = json.loads((base / "config.json").read_text())
    classes = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (base / "config.json").write_text(json.dumps({**values, "model_type": "own_llama", "auto_map": classes}))
    return base

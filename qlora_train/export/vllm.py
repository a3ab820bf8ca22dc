"""A run's adapter for vLLM, which serves LoRA beside a 16-bit base; what it would refuse or leave out is refused here.

vLLM reads seven settings of adapter_config.json and skips the others without a word (`rank_pattern` and `alpha_pattern`
would give another scale), and it passes over tensors of the base that an adapter brings along. What it takes: plain LoRA
and rsLoRA on linear layers, with one rank and one alpha. DoRA, `modules_to_save`, biases and trained token rows it does
not; an adapter on the output head only some of its model classes do. The merged model serves all of these.

Read in vLLM's sources: `vllm/config/lora.py`, `vllm/lora/peft_helper.py`, `vllm/lora/lora_model.py`, `vllm/lora/utils.py`.
"""

import json
import logging
import shlex
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from qlora_train.config import RunConfig
from qlora_train.export.loading_code import QUESTION
from qlora_train.export.merging.adapter_deltas import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from qlora_train.export.model_card import is_hub_id
from qlora_train.models import BaseSource
from qlora_train.runs import RunFolder
from qlora_train.utils import atomic_io
from qlora_train.utils.errors import ExportError, first_line

logger = logging.getLogger(__name__)

MAX_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of --max-lora-rank from 8; an adapter's own rank may be any up to it."""
CHAT_URL = "http://localhost:8000/v1/chat/completions"
"""Where vLLM listens by default."""
KEPT = (
    "peft_type",
    "task_type",
    "r",
    "lora_alpha",
    "target_modules",
    "use_rslora",
    "base_model_name_or_path",
    "revision",
)
"""Settings of a plain LoRA adapter; PEFT's defaults stand for the others."""
PLAIN = (".lora_A.weight", ".lora_B.weight")
OFF = {
    "use_dora": "DoRA magnitudes (lora.use_dora)",
    "modules_to_save": "modules that are trained in full (lora.modules_to_save)",
    "trainable_token_indices": "trained token rows (model.new_tokens)",
    "rank_pattern": "ranks that differ by layer (rank_pattern)",
    "alpha_pattern": "alphas that differ by layer (alpha_pattern)",
    "target_parameters": "adapters on stacked experts (target_parameters)",
    "layer_replication": "replicated layers (layer_replication)",
    "lora_bias": "biases of the adapter itself (lora_bias)",
}
"""Settings that must be off, by what they are for people."""


def check_vllm(adapter_folder: Path) -> tuple[str, ...]:
    """Return why vLLM cannot serve an adapter as LoRA, one reason an entry; empty when it can.

    Raises:
        ExportError: the folder holds no adapter that can be read.
    """
    config, names = _read(adapter_folder)
    reasons = [reason for key, reason in OFF.items() if config.get(key)]
    if config.get("peft_type") != "LORA":
        reasons.append(f"an adapter of type {config.get('peft_type')}, not LORA")
    if config.get("bias", "none") != "none":
        reasons.append(f"trained biases (lora.bias: {config['bias']})")
    if config.get("r", 0) > MAX_RANKS[-1]:
        reasons.append(f"rank {config['r']}, above {MAX_RANKS[-1]} (lora.r)")
    on_head = [name for name in names if name.split(".lora_")[0].endswith(("lm_head", "embed_out"))]
    if on_head:
        reasons.append("an adapter on the output head, which not all of its models take (lora.target_modules)")
    other = [name for name in names if not name.endswith(PLAIN)]
    if other and not reasons:
        reasons.append(f"tensors that are no LoRA matrices of linear layers, such as {other[0]}")
    return tuple(reasons)


def export_vllm(folder: RunFolder, config: RunConfig, source: BaseSource, output: Path) -> str:
    """Write a folder that vLLM serves as LoRA: the adapter with the settings that count, its tokenizer and its card.

    Args:
        folder: a finished run.
        config: its settings.
        source: its base.
        output: the folder to write, whole or not at all; its name is the model's for clients.

    Returns:
        The command that serves it on this machine.

    Raises:
        ExportError: vLLM cannot serve it as LoRA; the message says how to serve the merged model.
    """
    reasons = check_vllm(folder.adapter)
    if config.model.rope_scaling is not None:
        reasons += ("positions that are scaled and a base whose are not (model.rope_scaling)",)
    if reasons:
        raise ExportError(f"{folder.adapter}: vLLM's LoRA cannot hold {'; '.join(reasons)}; {_merged_instead(folder)}")
    settings, _ = _read(folder.adapter)
    kept = {key: settings[key] for key in KEPT if key in settings} | {"inference_mode": True}
    base = str(source.folder) if source.revision is None else source.name
    name, system = folder.path.resolve().name, folder.system_prompt()
    serve = partial(_command, config, source.revision, kept["r"], name)
    with atomic_io.atomic_folder(output, {"format": "vllm"}) as staging:
        for path in folder.adapter.iterdir():
            if path.is_dir():
                shutil.copytree(path, staging / path.name)
            elif path.name not in (atomic_io.MANIFEST, ADAPTER_CONFIG):
                shutil.copy2(path, staging / path.name)
        atomic_io.write_text(staging / ADAPTER_CONFIG, json.dumps(kept, indent=2, sort_keys=True) + "\n")
        card = staging / "README.md"
        section = _serving(serve(_public(source), "PATH-OF-THIS-FOLDER"), name, system)
        atomic_io.write_text(card, card.read_text(encoding="utf-8") + section)
    if config.quantization.load_in_4bit:
        logger.info(
            "vLLM: puts the adapter on the base in 16 bits, and it was trained on 4 bits; qlora-train merge with "
            "export.merge_base=original measures the difference"
        )
    if system:
        logger.info("vLLM: has no system prompt of its own; clients send the training rows', as in the card's request")
    local = serve(base, str(output))
    logger.info("vLLM: %s", local)
    return local


def _read(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Return an adapter's settings and the names of its tensors."""
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        with safe_open(str(folder / ADAPTER_WEIGHTS), framework="pt") as file:
            names = sorted(file.keys())
    except (OSError, ValueError, SafetensorError) as error:
        raise ExportError(
            f"{folder}: holds no adapter that can be read ({first_line(error)}); give one that PEFT wrote"
        ) from None
    if not isinstance(config, Mapping):
        raise ExportError(f"{folder / ADAPTER_CONFIG}: holds no mapping; give an adapter that PEFT wrote")
    return dict(config), names


def _merged_instead(folder: RunFolder) -> str:
    if folder.has_merged():
        return f"serve the merged model: {shlex.join(['vllm', 'serve', str(folder.merged)])}"
    return f"merge it (qlora-train merge {folder.path}) and serve that: {shlex.join(['vllm', 'serve', str(folder.merged)])}"


def _public(source: BaseSource) -> str:
    return source.name if is_hub_id(source.name) else "PATH-OF-THE-BASE"


def _command(config: RunConfig, revision: str | None, rank: int, name: str, base: str, adapter: str) -> str:
    """Return the command that serves an adapter under a name, with the run's chat template."""
    max_rank = next(allowed for allowed in MAX_RANKS if allowed >= rank)
    at = ["--revision", revision] if revision else []
    trust = ["--trust-remote-code"] if config.model.trust_remote_code else []
    lora = ["--enable-lora", "--max-lora-rank", str(max_rank), "--lora-modules", f"{name}={adapter}"]
    return shlex.join(["vllm", "serve", base, *at, *trust, *lora, "--tokenizer", adapter])


def _serving(command: str, name: str, system: str) -> str:
    """Return the card's section: the command, and a request for a greedy answer to a question as in training."""
    turns = [{"role": "system", "content": system}] if system else []
    content = {"model": name, "messages": [*turns, {"role": "user", "content": QUESTION}], "temperature": 0}
    header = ["-H", "Content-Type: application/json"]
    request = shlex.join(["curl", CHAT_URL, *header, "-d", json.dumps(content, ensure_ascii=False)])
    told = (
        " vLLM adds no system prompt: every request begins with that of the training rows, as this one."
        if system
        else ""
    )
    return (
        f"\n## Serving with vLLM\n\n```\n{command}\n```\n\nThe tokenizer in this folder has the chat template of the "
        f"training. A request names the model as `--lora-modules` does.{told}\n\n```\n{request}\n```\n"
    )

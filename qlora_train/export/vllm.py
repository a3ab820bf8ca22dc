"""Export a run's adapter for vLLM, which serves LoRA on a 16-bit base.

vLLM reads seven settings of adapter_config.json and ignores the rest, and it skips adapter tensors that are not LoRA. It
supports LoRA and rsLoRA on linear layers with one rank and one
alpha; LoRA on the output head only in some model classes. Everything else is refused here; the merged model serves it.

From vLLM's `vllm/config/lora.py`, `vllm/lora/peft_helper.py`, `vllm/lora/lora_model.py` and `vllm/lora/utils.py`.
"""

import json
import logging
import shlex
import shutil
from pathlib import Path

from safetensors import safe_open

from qlora_train.adapters.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_adapter_settings
from qlora_train.export.export_formats import ExportRequest
from qlora_train.export.loading_code import QUESTION
from qlora_train.export.model_card import is_hub_id
from qlora_train.utils import atomic_io
from qlora_train.utils.errors import ExportError

logger = logging.getLogger(__name__)

MAX_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Allowed values of --max-lora-rank from 8; an adapter's rank may be anything up to it."""
CHAT_URL = "http://localhost:8000/v1/chat/completions"
PLAIN_LORA_KEYS = (
    "peft_type", "task_type", "r", "lora_alpha", "target_modules", "use_rslora", "base_model_name_or_path", "revision",
)  # fmt: skip
"""Settings of plain LoRA; all others are left at PEFT's defaults."""
PLAIN_LORA_TENSORS = (".lora_A.weight", ".lora_B.weight")


def check_vllm(adapter_folder: Path) -> tuple[str, ...]:
    """Return the reasons why vLLM cannot serve an adapter as LoRA; empty when it can.

    Raises:
        ConfigError: the folder has no plain LoRA adapter.
    """
    settings = read_adapter_settings(adapter_folder, None)
    with safe_open(str(adapter_folder / ADAPTER_WEIGHTS), framework="pt") as file:
        names = sorted(file.keys())
    unsupported = {
        "DoRA (lora.use_dora)": settings.use_dora,
        "fully trained modules (lora.modules_to_save)": settings.modules_to_save,
        "trained token rows (model.new_tokens)": settings.trainable_token_indices,
        "LoRA on stacked experts (target_parameters)": settings.target_parameters,
        f"trained biases (lora.bias: {settings.bias})": settings.bias != "none",
        f"rank {settings.r}, above {MAX_RANKS[-1]} (lora.r)": settings.r > MAX_RANKS[-1],
        "LoRA on the output head, which only some of its models support (lora.target_modules)": any(
            name.split(".lora_")[0].endswith(("lm_head", "embed_out")) for name in names
        ),
    }
    reasons = [reason for reason, found in unsupported.items() if found]
    other = [name for name in names if not name.endswith(PLAIN_LORA_TENSORS)]
    if other and not reasons:
        reasons.append(f"tensors that are not LoRA of linear layers, such as {other[0]}")
    return tuple(reasons)


def export_vllm(request: ExportRequest) -> list[Path]:
    """Write `RUN/export/vllm`: the adapter with its supported settings, tokenizer and card; log the serve command.

    Raises:
        ExportError: vLLM cannot serve it as LoRA; the message says how to serve the merged model.
    """
    run, config, source = request.run, request.config, request.source
    assert source is not None, "the format needs the base"
    output, name, system = run.exports / "vllm", run.path.resolve().name, run.system_prompt()
    reasons = check_vllm(run.adapter)
    if config.model.rope_scaling is not None:
        reasons += ("RoPE scaling that the base does not have (model.rope_scaling)",)
    if reasons:
        merge_first = "" if run.has_merged() else f"merge it (qlora-train merge {run.path}) and "
        raise ExportError(
            f"{run.adapter}: vLLM cannot serve it as LoRA: {'; '.join(reasons)}; {merge_first}serve the merged model: "
            f"{shlex.join(['vllm', 'serve', str(run.merged)])}"
        )
    settings = json.loads((run.adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    kept = {key: settings[key] for key in PLAIN_LORA_KEYS if key in settings} | {"inference_mode": True}
    max_rank = next(allowed for allowed in MAX_RANKS if allowed >= kept["r"])
    options = ["--revision", source.revision] if source.revision else []
    options += ["--trust-remote-code"] if config.model.trust_remote_code else []
    options += ["--enable-lora", "--max-lora-rank", str(max_rank), "--lora-modules"]

    def command(base: str, adapter: str) -> str:
        return shlex.join(["vllm", "serve", base, *options, f"{name}={adapter}", "--tokenizer", adapter])

    with atomic_io.atomic_folder(output, {"format": "vllm"}) as staging:
        ignored = shutil.ignore_patterns(atomic_io.MANIFEST, ADAPTER_CONFIG)
        shutil.copytree(run.adapter, staging, ignore=ignored, dirs_exist_ok=True)
        atomic_io.write_text(staging / ADAPTER_CONFIG, json.dumps(kept, indent=2, sort_keys=True) + "\n")
        card = staging / "README.md"
        public_base = source.name if is_hub_id(source.name) else "PATH-OF-THE-BASE"
        section = _serving_section(command(public_base, "PATH-OF-THIS-FOLDER"), name, system)
        atomic_io.write_text(card, card.read_text(encoding="utf-8") + section)
    if config.quantization.load_in_4bit:
        logger.info(
            "vLLM: serves the adapter on the 16-bit base (trained on 4 bits); measure the difference with "
            "qlora-train merge export.merge_base=original"
        )
    if system:
        logger.info("vLLM: has no default system prompt; clients send the training one, as the card's request does")
    base = str(source.folder) if source.revision is None else source.name
    logger.info("serve it: %s", command(base, str(output)))
    return [output]


def _serving_section(command: str, name: str, system: str) -> str:
    """Return the card's section: the serve command, and a request for a greedy answer to a question."""
    turns = [{"role": "system", "content": system}] if system else []
    content = {"model": name, "messages": [*turns, {"role": "user", "content": QUESTION}], "temperature": 0}
    header = ["-H", "Content-Type: application/json"]
    request = shlex.join(["curl", CHAT_URL, *header, "-d", json.dumps(content, ensure_ascii=False)])
    note = " vLLM has no default system prompt: start each request with the training one, as below." if system else ""
    return (
        f"\n## Serving with vLLM\n\n```\n{command}\n```\n\nThe tokenizer in this folder has the chat template of the "
        f"training. A request names the model as `--lora-modules` does.{note}\n\n```\n{request}\n```\n"
    )

"""Read merged models with another version of Transformers and compare logits and tokens with the installed one.

Bases are written by both versions, since config.json names some settings differently. Every base has a RoPE base or scaling
that is not the default, and rows are longer than the range where the defaults would do.

Example::

    python -m venv /tmp/transformers-4
    /tmp/transformers-4/bin/pip install torch==2.13.0 transformers==4.57.6 sentencepiece
    python scripts/compare_transformers.py /tmp/transformers-4/bin/python
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).parents[1]
TEXT = "<|im_start|>user\nWhat is the capital of France? 12 345\n\n  two<|im_end|>\n"
NUM_TOKENS = 250
TOLERANCE = 2e-4
SCALINGS: dict[str, dict[str, Any]] = {
    "": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0, "original_max_position_embeddings": 64},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    },
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"llama {kind}".strip(): ("llama", {"rope": kind}) for kind in SCALINGS},
    **{
        name: (name, {"rope": ""})
        for name in (
            "mistral", "qwen2", "qwen3", "granite", "olmo2", "smollm3", "cohere", "cohere2", "starcoder2", "stablelm",
            "phi", "glm4", "falcon", "gemma", "gemma2", "qwen3_moe", "mixtral", "deepseek_v3", "gpt2", "exaone4",
        )
    },
    "qwen3 yarn": ("qwen3", {"rope": "yarn"}),
    "deepseek_v3 yarn": ("deepseek_v3", {"rope": "yarn"}),
    "phi3": ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.5] * 8, "long_factor": [3.0] * 8},
                      "original_max_position_embeddings": 64}),
    "gpt_neox": ("gpt_neox", {"rotary_emb_base": 500_000, "rotary_pct": 0.5}),
    "gemma3_text": ("gemma3_text", {"rope": "linear", "rope_local_base_freq": 3_000.0,
                                    "layer_types": ["sliding_attention", "full_attention"]}),
    "gpt_oss": ("gpt_oss", {"rope": "yarn", "layer_types": ["sliding_attention", "full_attention"]}),
    "olmo3": ("olmo3", {"rope": "yarn", "layer_types": ["sliding_attention", "full_attention"]}),
    "glm4_moe": ("glm4_moe", {"rope": "", "partial_rotary_factor": 0.5}),
    "nemotron": ("nemotron", {"rope": "", "partial_rotary_factor": 0.25}),
}  # fmt: skip
"""Model type and settings by the names of Transformers 4, which Transformers 5 reads too."""


def main() -> None:
    """Print a line for every base: the largest difference of the logits, and whether the tokens are the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", help="an interpreter with the other version, or the work that it is given")
    parser.add_argument("--only", default="", help="part of the names of the cases")
    arguments = parser.parse_args()
    if arguments.python in ("write", "read"):
        work = {"write": write, "read": read}[arguments.python]
        print(json.dumps(work(json.load(sys.stdin))))
        return
    sys.path.insert(0, str(ROOT))
    cases = {name: case for name, case in CASES.items() if arguments.only in name}
    with tempfile.TemporaryDirectory() as folder:
        compare(arguments.python, Path(folder), cases)


def compare(python: str, folder: Path, cases: dict[str, tuple[str, dict[str, Any]]]) -> None:
    """Write bases with both versions, merge each with an adapter, read the merges with both."""
    from tests.support.pico import build_tokenizer

    build_tokenizer().save_pretrained(folder / "tokenizer")
    bases = [
        {"case": name, "writer": writer, "folder": str(folder / f"{name}-{writer}"), "model_type": model_type,
         "settings": settings_of(model_type, settings), "tokenizer": str(folder / "tokenizer" / "tokenizer.json")}
        for name, (model_type, settings) in cases.items()
        for writer in ("other", "installed")
    ]  # fmt: skip
    other = asked(python, "write", [base for base in bases if base["writer"] == "other"])
    written = other["problems"] | write([base for base in bases if base["writer"] == "installed"])["problems"]
    merged = {base["folder"]: merge(Path(base["folder"])) for base in bases if base["folder"] not in written}
    asked(python, "read", list(merged.values()))
    report(bases, merged, written, other["version"])


def settings_of(model_type: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a config by the names of Transformers 4."""
    from tests.support.pico import COMMON, FAMILIES

    settings = dict(settings)
    kind = settings.pop("rope", None)
    rope: dict[str, Any] = {} if kind is None else {"rope_theta": 500_000.0}
    if kind:
        rope["rope_scaling"] = {"rope_type": kind, **SCALINGS[kind]}
    return {**COMMON, **FAMILIES.get(model_type, {}), **rope, **settings}


def merge(base: Path) -> dict[str, str]:
    """Merge a random adapter with the tokenizer that a run saves; return where from and where to."""
    from qlora_train.config import ModelSection
    from qlora_train.export.merging.merge_files import MergeSettings, merge_adapter
    from qlora_train.models import load_tokenizer, resolve_base
    from qlora_train.models.tokenizer import save_tokenizer
    from tests.support.merging import NF4, plain, save_adapter

    section = ModelSection(model_name_or_path=str(base))
    adapter, output = (base.with_name(f"{base.name}-{what}") for what in ("adapter", "merged"))
    try:
        save_adapter(plain(base), adapter)
        save_tokenizer(load_tokenizer(resolve_base(section), section), adapter)
        merge_adapter(MergeSettings(base, adapter, NF4, torch.float32), output, "original")
    except Exception as error:
        return {"folder": str(output), "problem": f"{type(error).__name__}: {error}"}
    return {"folder": str(output)}


def report(bases: list[dict[str, Any]], merged: dict[str, Any], problems: dict[str, str], other: str) -> None:
    """Compare what the other version read with what this one reads."""
    print(f"installed {transformers.__version__}, other {other}, {NUM_TOKENS} tokens, float32")
    for base in bases:
        line = f"{base['case']:<18} written by {base['writer']:<10}"
        entry = merged.get(base["folder"])
        if entry is None or "problem" in entry:
            problem = problems[base["folder"]] if entry is None else entry["problem"]
            print(f"{line} not compared: {problem[:160]}")
            continue
        theirs = json.loads(Path(entry["folder"]).with_suffix(".json").read_text(encoding="utf-8"))
        ours = outcome(Path(entry["folder"]))
        print(
            f"{line} {compared(ours['logits'], theirs['logits'], 'logits')}; "
            f"{compared(ours['tokens'], theirs['tokens'], 'tokens')}"
        )


def compared(ours: Any, theirs: Any, what: str) -> str:
    """Return how what the two versions made of a folder compares."""
    for found in (ours, theirs):
        if isinstance(found, str):
            return f"DIFFERENT {what}: {found[:140]}"
    if what == "tokens":
        return "same tokens" if ours == theirs else f"DIFFERENT tokens: {theirs} and not {ours}"
    difference = (torch.tensor(ours) - torch.tensor(theirs)).abs().max().item()
    return f"{'same' if difference < TOLERANCE else 'DIFFERENT'} logits ({difference:.1e})"


def asked(python: str, task: str, content: Any) -> dict[str, Any]:
    """Let the other version do a task of this file."""
    command = [python, str(Path(__file__)), task]
    result = subprocess.run(command, input=json.dumps(content), capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"{' '.join(command)}: {result.stderr}")
    answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return answer


def write(bases: list[dict[str, Any]]) -> dict[str, Any]:
    """Write random models with the Transformers that runs this; return what could not be written."""
    problems: dict[str, str] = {}
    for base in bases:
        try:
            torch.manual_seed(0)
            config = transformers.AutoConfig.for_model(base["model_type"], **base["settings"])
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(base["folder"])
            transformers.PreTrainedTokenizerFast(
                tokenizer_file=base["tokenizer"], eos_token="<|im_end|>", pad_token="<|pad|>",
                additional_special_tokens=["<|im_start|>", "<|endoftext|>"],
            ).save_pretrained(base["folder"])  # fmt: skip
        except Exception as error:
            problems[base["folder"]] = f"{type(error).__name__}: {error}"
    return {"version": transformers.__version__, "problems": problems}


def read(merged: list[dict[str, str]]) -> dict[str, Any]:
    """Write what the Transformers that runs this makes of each folder beside it."""
    for entry in merged:
        folder = Path(entry["folder"])
        if "problem" not in entry:
            folder.with_suffix(".json").write_text(json.dumps(outcome(folder)), encoding="utf-8")
    return {}


def outcome(folder: Path) -> dict[str, Any]:
    """Return the last logits of a long row and the tokens of a text, each the problem where a folder cannot be read."""
    return {"logits": attempt(logits_of, folder), "tokens": attempt(tokens_of, folder)}


def attempt(work: Callable[[Path], Any], folder: Path) -> Any:
    """Return what a function makes of a folder, or its error in words."""
    try:
        return work(folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@torch.no_grad()
def logits_of(folder: Path) -> Any:
    """Return the logits at the last positions of a long row."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = torch.randint(4, 300, (1, NUM_TOKENS), generator=torch.Generator().manual_seed(1))
    return model(input_ids=ids).logits[0, -50:].tolist()


def tokens_of(folder: Path) -> Any:
    """Return the tokens of a text with a chat's special tokens."""
    return transformers.AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]


if __name__ == "__main__":
    main()

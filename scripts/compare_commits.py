"""Compare two commits on this machine: everything that a change of names or layout must leave equal.

Each commit is checked out and used through its command line. Compared are:

- tensors of adapters, checkpoints and merged models (sha256), logged losses, and GGUF files of pico models;
- the prepared rows and loss masks of all bundled data;
- help texts, and exit status and message of each malformed config;
- the number of imported modules, and the paired speed and peak memory of the demo.

The exit status is 1 if anything but the last two differs.

Example::

    python scripts/compare_commits.py HEAD~20 HEAD --output benchmarks/results/compare.json
    python scripts/compare_commits.py v1 v2 --parts families --families llama qwen3
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_neox", "falcon", "olmo2",
    "qwen3_moe", "gpt_oss",
)  # fmt: skip
GGUF_FORMATS = ("gguf", "lora-gguf", "base-gguf")
COMMANDS = ("", "train", "check", "show", "data", "schema", "merge", "export", "eval", "chat")
PARTS = ("help", "statuses", "data", "imports", "families", "demo")
DEMO_STEPS = 8

Found = dict[str, dict[str, Any]]
"""What a part found: by case, then by file or figure."""


@dataclass(frozen=True)
class Finished:
    """A command that ended: its exit status, output, and peak memory of the process in bytes."""

    status: int
    stdout: str
    stderr: str
    peak_bytes: int


@dataclass(frozen=True)
class Commit:
    """A commit that is checked out.

    Attributes:
        name: as it was given.
        tree: the checkout.
        work: folder for its runs; its path is replaced by `WORK` in every text that is compared.
    """

    name: str
    tree: Path
    work: Path

    @cached_property
    def entry(self) -> str:
        """Code that runs the command line."""
        project = tomllib.loads((self.tree / "pyproject.toml").read_text())
        module, function = project["project"]["scripts"]["qlora-train"].split(":")
        return f"import sys; sys.argv[0] = 'qlora-train'; from {module} import {function}; sys.exit({function}())"

    @cached_property
    def schema(self) -> str:
        """The JSON schema of its config."""
        return self.run("schema").stdout

    def key(self, *names: str) -> str:
        """Return the name that this commit has for a setting that was renamed."""
        return next(name for name in names if f'"{name}"' in self.schema)

    def run(self, *arguments: str, options: Sequence[str] = (), threads: int = 1) -> Finished:
        """Run a command of this commit in its checkout."""
        environment = {**os.environ, "PYTHONPATH": str(self.tree), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
                       "OMP_NUM_THREADS": str(threads), "COLUMNS": "100", "NO_COLOR": "1"}  # fmt: skip
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            process = subprocess.Popen([sys.executable, *options, "-c", self.entry, *arguments], cwd=self.tree, stdout=out,
                                       stderr=err, env=environment, stdin=subprocess.DEVNULL)  # fmt: skip
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            texts = [(file.seek(0), file.read())[1] for file in (out, err)]
        return Finished(process.returncode, texts[0], texts[1], usage.ru_maxrss * 1024)

    def plain(self, text: str) -> str:
        """Return a text without what differs between any two runs: folders, times, process ids."""
        text = text.replace(str(self.work), "WORK").replace(str(self.tree), "TREE")
        return re.sub(r"\b\d+(\.\d+)? ?(s|ms|seconds|minutes|MB|GB|GiB|MiB)\b", "N", text)


def sha256(data: bytes) -> str:
    """Return a short digest."""
    return hashlib.sha256(data).hexdigest()[:16]


def tensors(folder: Path) -> dict[str, str]:
    """Return a digest of the tensors of every safetensors file under a folder."""
    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            parts = [f"{name}:{_digest(opened.get_tensor(name))}" for name in sorted(opened.keys())]
        found[str(file.relative_to(folder))] = sha256("\n".join(parts).encode())
    return found


def _digest(tensor: torch.Tensor) -> str:
    data = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype}:{tuple(tensor.shape)}:{sha256(data)}"


def losses(run: Path) -> list[float]:
    """Return the logged losses of a run."""
    file = run / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [line[key] for line in lines for key in ("loss", "eval_loss") if key in line]


def compare_help(commit: Commit, _: argparse.Namespace, __: Path) -> Found:
    """Help texts."""
    return {name or "qlora-train": {"help": commit.run(*filter(None, [name]), "--help").stdout} for name in COMMANDS}


def compare_statuses(commit: Commit, _: argparse.Namespace, shared: Path) -> Found:
    """Exit status and message of every malformed config."""
    files = sorted((shared / "tests" / "files" / "malformed_configs").glob("*.yaml"))
    return dict(_each(files, lambda file: (file.stem, _checked(commit, file))))


def _checked(commit: Commit, file: Path) -> dict[str, Any]:
    finished = commit.run("check", str(file))
    return {"status": finished.status, "message": commit.plain(finished.stderr)}


def compare_data(commit: Commit, _: argparse.Namespace, shared: Path) -> Found:
    """Report and rows, with their loss mask, of bundled and malformed data."""
    folders = (shared / "data" / "examples", shared / "tests" / "files" / "malformed")
    files = [
        file for folder in folders for file in sorted(folder.iterdir()) if file.suffix not in {".expected", ".settings"}
    ]
    return dict(_each(files, lambda file: (f"{file.parent.name}/{file.name}", _prepared(commit, file, shared))))


def _prepared(commit: Commit, file: Path, shared: Path) -> dict[str, Any]:
    settings = commit.work / "data" / f"{file.name}.yaml"
    settings.parent.mkdir(exist_ok=True)
    settings.write_text(
        json.dumps({"model": {"model_name_or_path": str(shared / "llama")}, "data": {"train": str(file)}})
    )
    finished = commit.run("data", "--show", "1000", "--json", str(settings))
    return {
        "status": finished.status,
        "report": commit.plain(finished.stdout),
        "message": commit.plain(finished.stderr),
    }


def compare_imports(commit: Commit, _: argparse.Namespace, shared: Path) -> Found:
    """Modules of the package that a command imports."""
    file = _config(commit, shared, "llama", "imports")
    found: Found = {}
    for command in ("check", "train"):
        log = commit.run(command, str(file), options=["-X", "importtime"]).stderr
        names = set(re.findall(r"\|\s+(qlora_train[\w.]*)$", log, re.MULTILINE))
        found[command] = {"modules": len(names)}
    return found


def compare_families(commit: Commit, arguments: argparse.Namespace, shared: Path) -> Found:
    """Adapter, checkpoints, losses, merged model and GGUF files of pico models, with fused kernels and the reference."""
    cases = [(family, kind) for family in arguments.families for kind in ("fused", "reference")]
    return dict(_each(cases, lambda case: (" ".join(case), _trained(commit, shared, *case))))


def _trained(commit: Commit, shared: Path, family: str, kind: str) -> dict[str, Any]:
    file = _config(commit, shared, family, f"{family}-{kind}")
    run = commit.work / f"{family}-{kind}"
    trained = commit.run(str(file), f"train.{commit.key('fused_kernels', 'fast_path')}={json.dumps(kind == 'fused')}")
    found = {"status": trained.status, "losses": losses(run)}
    if trained.status:
        return {**found, "message": commit.plain(trained.stderr[-2000:])}
    if kind == "fused":
        found["merge status"] = commit.run("merge", str(run)).status
    if (family, kind) == ("llama", "fused"):
        for name in GGUF_FORMATS:
            found[f"export {name} status"] = commit.run("export", str(run), "--format", name).status
        found |= {str(each.relative_to(run)): sha256(each.read_bytes()) for each in sorted(run.rglob("*.gguf"))}
    return {**found, **tensors(run)}


def _config(commit: Commit, shared: Path, family: str, name: str) -> Path:
    file = commit.work / f"{name}.yaml"
    file.write_text(json.dumps({
        "model": {"model_name_or_path": str(shared / family)},
        "lora": {"r": 8},
        "data": {"train": str(shared / "data" / "examples" / "chat.jsonl"), "eval": 0.25, "max_length": 128,
                 "max_dropped": 1.0, commit.key("overflow", "too_long"): "truncate"},
        "train": {"learning_rate": 1e-2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
                  "max_steps": 4, "logging_steps": 1, "save_steps": 2, "save_total_limit": 9},
        "run": {"seed": 7, "output_dir": str(commit.work / name)},
    }))  # fmt: skip
    return file


def compare_demo(commits: Sequence[Commit], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Tokens per second, peak memory (GB) and losses of the demo's first steps, the commits in turn."""
    found: dict[str, dict[str, list[float]]] = {
        commit.name: {"tokens_per_second": [], "peak_gb": []} for commit in commits
    }
    for number in range(rounds):
        for commit in commits if number % 2 == 0 else commits[::-1]:
            output = commit.work / f"demo-{number}"
            overrides = {"model.model_name_or_path": ROOT / ".demo" / "SmolLM2-135M-Instruct", "data.eval": "null",
                         "data.train": ROOT / ".demo" / "addresses" / "train.jsonl", "train.logging_steps": 1,
                         "train.max_steps": DEMO_STEPS, "export.merge": "false", "run.output_dir": output}  # fmt: skip
            finished = commit.run(
                "configs/demo.yaml", *(f"{key}={value}" for key, value in overrides.items()), threads=2
            )
            if finished.status:
                raise SystemExit(f"{commit.name}: the demo ended with {finished.status}: {finished.stderr[-500:]}")
            span = json.loads((output / "results.json").read_text())["training"]["since_last_start"]
            found[commit.name]["tokens_per_second"].append(span["num_tokens"] / span["train_seconds"])
            found[commit.name]["peak_gb"].append(finished.peak_bytes / 1e9)
            found[commit.name]["losses"] = losses(output)
    return found


def _each(cases: Iterable[Any], compute: Any) -> list[tuple[str, dict[str, Any]]]:
    """Compute cases, two at a time, in order."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compute, cases))


def differences(before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a line for each value that differs."""
    lines = []
    for case in {**before, **after}:
        old, new = before.get(case, {}), after.get(case, {})
        for key in {**old, **new}:
            if old.get(key) != new.get(key):
                lines.append(f"{case}: {key}: {_short(old.get(key))} -> {_short(new.get(key))}")
    return lines


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 160 else f"{text[:100]}... ({len(text)} characters, {sha256(text.encode())})"


def check_out(name: str, folder: Path) -> Commit:
    """Check a commit out into a folder."""
    tree = folder / "tree"
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(tree), name], cwd=ROOT, check=True)
    (folder / "work").mkdir()
    return Commit(name, tree, folder / "work")


def make_shared(folder: Path, families: Sequence[str]) -> Path:
    """Put pico models and data where both commits read them."""
    from tests.support.pico import build_pico

    for name in ("data/examples", "tests/files/malformed", "tests/files/malformed_configs"):
        shutil.copytree(ROOT / name, folder / name)
    for family in dict.fromkeys(("llama", *families)):
        build_pico(folder / family, family)
    return folder


def print_demo(found: dict[str, dict[str, list[float]]], names: Sequence[str]) -> None:
    """Print medians and the ratio of the second commit to the first."""
    for figure in ("tokens_per_second", "peak_gb"):
        before, after = (found[name][figure] for name in names)
        ratio = statistics.median(b / a for a, b in zip(before, after, strict=True))
        print(f"demo {figure}: {statistics.median(before):.4g} -> {statistics.median(after):.4g}, ratio {ratio:.3f}")
    before, after = (found[name]["losses"] for name in names)
    print("demo losses:", "equal" if before == after else f"{before} -> {after}", flush=True)


def main() -> int:
    """Compare two commits and print what differs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("before")
    parser.add_argument("after")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--families", nargs="+", default=FAMILIES)
    parser.add_argument("--rounds", type=int, default=5, help="of the demo (5)")
    parser.add_argument("--output", type=Path, help="JSON file for everything that was found")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"before": arguments.before, "after": arguments.after}
    num_different = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        shared = make_shared(folder / "shared", arguments.families)
        commits = []
        for label, name in (("1", arguments.before), ("2", arguments.after)):
            (folder / label).mkdir()
            commits.append(check_out(name, folder / label))
        try:
            for part in arguments.parts:
                began = time.monotonic()
                if part == "demo":
                    result[part] = compare_demo(commits, arguments.rounds)
                    print_demo(result[part], [commit.name for commit in commits])
                    continue
                before, after = (globals()[f"compare_{part}"](commit, arguments, shared) for commit in commits)
                lines = differences(before, after)
                result[part] = {"cases": len(after), "values": sum(map(len, after.values())), "different": lines}
                print(f"{part}: {len(after)} cases, {result[part]['values']} values, {len(lines)} different "
                      f"({time.monotonic() - began:.0f} s)", *lines, sep="\n  ", flush=True)  # fmt: skip
                num_different += len(lines) if part != "imports" else 0
        finally:
            for commit in commits:
                subprocess.run(["git", "worktree", "remove", "--force", str(commit.tree)], cwd=ROOT, check=False)
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    return int(num_different > 0)


if __name__ == "__main__":
    sys.exit(main())

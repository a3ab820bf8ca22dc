"""Upload an adapter or a merged model with its card to the Hub, after every file was checked.

Only model files are sent: weights, config, tokenizer, card, and code that the config refers to. A folder with any other
file is refused as a whole, and so is a text with a path of this machine or a secret: what was public for a second stays
public.
"""

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from qlora_train.export.merging.auxiliary_files import NAMED_TEMPLATES
from qlora_train.runs import finished_run
from qlora_train.utils import network
from qlora_train.utils.atomic_io import MANIFEST, verify_manifest
from qlora_train.utils.errors import ExportError, first_line
from qlora_train.utils.secrets import secret_error

logger = logging.getLogger(__name__)

CARD = "README.md"
WEIGHTS = "*.safetensors"
VOCABULARIES = (
    "tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json", "*.model", "tiktoken*",
)  # fmt: skip
"""Not searched for paths: what looks like one is a token."""
TEXTS = (
    CARD, "config.json", "adapter_config.json", "generation_config.json", "tokenizer_config.json",
    "special_tokens_map.json", "chat_template.json", "*processor_config.json", "*.jinja", "*.index.json", "merge.json",
    "*.py", "LICENSE*", "NOTICE*",
)  # fmt: skip
_PATH = re.compile(r"(?<![\w/.:<@-])(?:(?:/[\w.@+ -]*[\w.@+-]){2,}|~/[\w.-]+|file:/|[A-Za-z]:\\\w+)")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TOKEN_PAGE = "https://huggingface.co/settings/tokens"
_HINTS: dict[str | int, str] = {
    401: f"it does not know the token; set HF_TOKEN to one with write access ({_TOKEN_PAGE})",
    403: f"the token has no write access there; grant it ({_TOKEN_PAGE}), or name another owner",
    404: "no such owner, or the token has no access to it; check the name",
    413: "a file or the upload is too large",
    429: "too many requests; wait, then repeat the command",
    "HFValidationError": "give owner/name",
    "unreachable": "failed: the Hub cannot be reached; check the network, then repeat the command (sent files are kept)",
}


@dataclass(frozen=True)
class Upload:
    """A checked folder: its files with sizes in bytes, and the repository they go to."""

    folder: Path
    repo: str
    private: bool
    files: tuple[tuple[str, int], ...]
    card: str

    def lines(self) -> Iterator[str]:
        """Yield the output of a dry run."""
        visibility = "private" if self.private else "PUBLIC"
        yield f"repository: {self.repo} ({visibility} if new; an existing one keeps its visibility)"
        yield f"from: {self.folder}"
        width = max(len(name) for name, _ in self.files)
        yield from (f"  {name:<{width}}  {size / 1e6:12,.3f} MB" for name, size in self.files)
        yield f"  {'total':<{width}}  {sum(size for _, size in self.files) / 1e6:12,.3f} MB"
        yield f"card ({CARD}):"
        yield from (f"  {line}" if line else "" for line in self.card.splitlines())


def plan_run_upload(path: Path, repo: str, *, what: str, private: bool) -> Upload:
    """Return what a finished run would upload to the Hub; `what` is `adapter` or `merged`.

    Raises:
        ExportError: no merged model, or something in the folder must not be uploaded.
    """
    folder = finished_run(path)
    if what == "merged" and not folder.has_merged():
        raise ExportError(f"{folder.merged}: missing or damaged; make it with: qlora-train merge {folder.path}")
    return plan_upload(folder.merged if what == "merged" else folder.adapter, repo, private=private)


def plan_upload(folder: Path, repo: str, *, private: bool) -> Upload:
    """Check every file of an adapter or a merged model that would be sent, without network access.

    Raises:
        ExportError: `repo` is not a repository name, or the folder is damaged, has no card, or has a file that is not of a
            model or holds a path or a secret.
    """
    if not _REPO.fullmatch(repo) or "--" in repo or ".." in repo:
        raise ExportError(f"--push {repo}: not a repository name; give owner/name, for example my-name/my-model")
    if problem := verify_manifest(folder):
        raise ExportError(f"{folder}: {problem}; not sent: train or merge again")
    templates = folder / NAMED_TEMPLATES
    paths = sorted(path for path in folder.rglob("*") if path.name != MANIFEST and path != templates)
    unknown = [path.name for path in paths if path.is_dir() or not _is_model_file(path, templates)]
    if unknown:
        raise ExportError(f"{folder}: {', '.join(unknown[:3])}: not a model file; remove it, then push again")
    if not (folder / CARD).is_file():
        raise ExportError(f"{folder}: no {CARD}; a model is not sent without its card: train or merge again")
    problems = [problem for path in paths if _matches(path.name, TEXTS) for problem in _private_content(path)]
    if problems:
        raise ExportError(problems)
    files = tuple((path.relative_to(folder).as_posix(), path.stat().st_size) for path in paths)
    return Upload(folder, repo, private, files, (folder / CARD).read_text(encoding="utf-8"))


def push(upload: Upload) -> str:
    """Send a checked folder in one commit and return the commit's URL.

    Raises:
        ExportError: offline, no token, no write access, or the Hub does not answer.
    """
    if network.is_offline():
        raise ExportError(f"--push {upload.repo}: offline (--offline or HF_HUB_OFFLINE=1); --dry-run works offline")
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise ExportError(
            f"--push {upload.repo}: no token; set HF_TOKEN to one with write access ({_TOKEN_PAGE}), or hf auth login"
        )
    api = HfApi()
    with network.hub_errors(f"--push {upload.repo}", ExportError, _HINTS):
        api.create_repo(upload.repo, private=upload.private, exist_ok=True)
        commit: Any = api.upload_folder(
            repo_id=upload.repo,
            folder_path=upload.folder,
            allow_patterns=[name for name, _ in upload.files],
            commit_message="Upload with qlora-train",
        )
    return str(commit.commit_url)


def _is_model_file(path: Path, templates: Path) -> bool:
    return _matches(path.name, ("*.jinja",) if path.parent == templates else (WEIGHTS, *VOCABULARIES, *TEXTS))


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _private_content(path: Path) -> Iterator[str]:
    """Yield an error message for a secret and for a local path in a text file."""
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix == ".json":
        try:
            text = "\n".join(_strings(json.loads(text)))
        except ValueError as error:
            raise ExportError(f"{path}: not readable ({first_line(error)}); train or merge again") from None
    if found := secret_error(text):
        yield f"{path}: {found}"
    if path.suffix != ".py" and (match := _PATH.search(text)):
        yield f"{path}: contains the local path {match[0]}; remove it, then push again"


def _strings(value: Any) -> Iterator[str]:
    """Yield the strings in JSON data except tokens and templates, in which a slash does not mean a path."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in ("added_tokens_decoder", "chat_template", "weight_map"):
                yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)

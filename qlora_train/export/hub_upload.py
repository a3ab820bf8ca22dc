"""Upload an adapter or a merged model with its card to the Hub: what is sent is looked at first, file by file.

Only files of a model are sent: weights, configuration, tokenizer, card, and code that the configuration refers to. A folder
that holds anything else is refused rather than sent in part. So is a text that names a path of this machine or holds a
secret: names of users and projects stand in paths, and what was public for a second stays public. Training data, optimizer
states and the run's own records lie in other folders and are never looked for.
"""

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from qlora_train.export.merging.auxiliary_files import NAMED_TEMPLATES
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
"""Made by whoever made the base; what looks like a path in them is a token."""
TEXTS = (
    CARD, "config.json", "adapter_config.json", "generation_config.json", "tokenizer_config.json",
    "special_tokens_map.json", "chat_template.json", "*processor_config.json", "*.jinja", "*.index.json", "merge.json",
    "*.py", "LICENSE*", "NOTICE*",
)  # fmt: skip
"""Read before they are sent."""
_PATH = re.compile(r"(?<![\w/.:<@-])(?:(?:/[\w.@+ -]*[\w.@+-]){2,}|~/[\w.-]+|file:/|[A-Za-z]:\\\w+)")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TOKEN_PAGE = "https://huggingface.co/settings/tokens"


@dataclass(frozen=True)
class Upload:
    """A folder that may be sent: its files with their sizes in bytes, and where they go."""

    folder: Path
    repo: str
    private: bool
    files: tuple[tuple[str, int], ...]
    card: str

    def lines(self) -> Iterator[str]:
        """Yield what a dry run prints."""
        visible = "private" if self.private else "PUBLIC"
        yield f"repository: {self.repo} ({visible} where it is made anew; one that is there stays as it is)"
        yield f"from: {self.folder}"
        width = max(len(name) for name, _ in self.files)
        yield from (f"  {name:<{width}}  {size / 1e6:12,.3f} MB" for name, size in self.files)
        yield f"  {'in all':<{width}}  {sum(size for _, size in self.files) / 1e6:12,.3f} MB"
        yield f"its card ({CARD}):"
        yield from (f"  {line}" if line else "" for line in self.card.splitlines())


def plan_upload(folder: Path, repo: str, *, private: bool) -> Upload:
    """Look at all that would be sent; touches no network.

    Args:
        folder: an adapter or a merged model, whole.
        repo: `owner/name`.
        private: whether a repository that is made anew is private.

    Raises:
        ExportError: the folder is damaged, holds what is no part of a model, names a path, holds a secret or has no card;
            or `repo` is none.
    """
    if not _REPO.fullmatch(repo) or "--" in repo or ".." in repo:
        raise ExportError(f"--push {repo}: is no repository; give owner/name, for example my-name/my-model")
    if problem := verify_manifest(folder):
        raise ExportError(f"{folder}: {problem}; it is not sent as it is: train or merge again")
    templates = folder / NAMED_TEMPLATES
    paths = sorted(path for path in folder.rglob("*") if path.name != MANIFEST and path != templates)
    strange = [path.name for path in paths if path.is_dir() or not _is_of_a_model(path, templates)]
    if strange:
        raise ExportError(
            f"{folder}: {', '.join(strange[:3])}: no part of a model that is known here; take it out of the folder, then "
            "push again"
        )
    if not (folder / CARD).is_file():
        raise ExportError(f"{folder}: no {CARD}; a model is not sent without its card: train or merge again")
    problems = [problem for path in paths if _matches(path.name, TEXTS) for problem in _private_things(path)]
    if problems:
        raise ExportError(problems)
    files = tuple((path.relative_to(folder).as_posix(), path.stat().st_size) for path in paths)
    return Upload(folder, repo, private, files, (folder / CARD).read_text(encoding="utf-8"))


def push(upload: Upload) -> str:
    """Send what was planned, in one commit, and return its address.

    Raises:
        ExportError: offline, no token, one that may not write, or the Hub does not answer.
    """
    if network.is_offline():
        raise ExportError(
            f"--push {upload.repo}: offline nothing is sent (--offline or HF_HUB_OFFLINE=1); see --dry-run"
        )
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise ExportError(
            f"--push {upload.repo}: no token; set HF_TOKEN to one that may write ({_TOKEN_PAGE}), or hf auth login"
        )
    api = HfApi()
    with _hub_errors(upload.repo):
        api.create_repo(upload.repo, private=upload.private, exist_ok=True)
        names = [name for name, _ in upload.files]
        done: Any = api.upload_folder(
            repo_id=upload.repo,
            folder_path=upload.folder,
            allow_patterns=names,
            commit_message="Upload with qlora-train",
        )
    return str(done.commit_url)


def _is_of_a_model(path: Path, templates: Path) -> bool:
    return _matches(path.name, ("*.jinja",) if path.parent == templates else (WEIGHTS, *VOCABULARIES, *TEXTS))


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _private_things(path: Path) -> Iterator[str]:
    """Yield what in a text is nobody else's business, a line each."""
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix == ".json":
        text = "\n".join(_strings(_parsed(path, text)))
    if found := secret_error(text):
        yield f"{path}: {found}"
    if path.suffix != ".py" and (match := _PATH.search(text)):
        yield f"{path}: names a path of a machine, {match[0]}; take it out, then push again"


def _parsed(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ExportError(f"{path}: not readable ({first_line(error)}); train or merge again") from None


def _strings(value: Any) -> Iterator[str]:
    """Yield the strings of JSON-like data, but not those of tokens, where a slash is a character."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in ("added_tokens_decoder", "chat_template", "weight_map"):
                yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Turn what the Hub's client raises while something is sent into one line."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        raise ExportError(f"--push {repo}: the Hub answered {status}: {_MEANINGS.get(status, 'try again')}") from None
    except errors.HFValidationError as error:
        raise ExportError(f"--push {repo}: is no repository ({first_line(error)}); give owner/name") from None
    # HTTPError is the base of whatever the client's HTTP library raises on the way
    except (errors.HTTPError, errors.OfflineModeIsEnabled, ConnectionError, TimeoutError):  # type: ignore[attr-defined]
        raise ExportError(
            f"--push {repo}: the Hub cannot be reached; check the network, then repeat the command: what was sent stays"
        ) from None


_MEANINGS = {
    401: f"it does not know the token; set HF_TOKEN to one that may write ({_TOKEN_PAGE})",
    403: f"the token may not write there; give it the right to ({_TOKEN_PAGE}), or another owner",
    404: "there is no such owner, or the token may not see it; check the name",
    413: "a file or the whole is too large for it",
    429: "too many requests; wait a while, then repeat the command",
}
"""What to do about an answer of the Hub."""

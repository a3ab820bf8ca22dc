"""Secrets come from the environment and go nowhere: they are recognised by their look, and by the values that are set.

Every provider gives its tokens a prefix, an alphabet and a length, so that a token is told from a name that only begins
like one (``sk-learn``, ``hf_data``). What has no such look, a password for example, is known by its value when an
environment variable of `VARIABLES` holds it.

A token in a form that is not listed, or one that stands in the data, is not seen.
"""

import logging
import os
import re
from dataclasses import dataclass

HIDDEN = "[secret]"
SHORTEST_VALUE = 6
"""Shorter values of variables are left alone: they would be found in any text."""

VARIABLES = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN",
    "DATABRICKS_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "GOOGLE_API_KEY",
    "AZURE_CLIENT_SECRET", "AZURE_STORAGE_KEY", "AZURE_STORAGE_CONNECTION_STRING", "OPENAI_API_KEY",
    "ANTHROPIC_API_KEY", "GITHUB_TOKEN", "GH_TOKEN", "GITLAB_TOKEN", "SLACK_TOKEN",
)  # fmt: skip
"""Environment variables whose values are secret, of this program's libraries and of their usual neighbours."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What one provider's secrets look like.

    Attributes:
        name: what people call it, with the beginning that gives it away.
        pattern: the secret inside a text, and nothing around it.
        instead: the environment variable that it belongs into.
    """

    name: str
    pattern: re.Pattern[str]
    instead: str


def _token(text: str) -> re.Pattern[str]:
    """Return a pattern for a token that begins a word."""
    return re.compile(rf"(?<![A-Za-z0-9])(?:{text})", re.ASCII)


KINDS = (
    Kind("a Hugging Face token (hf_...)", _token(r"(?:hf|api_org)_[A-Za-z0-9]{30,}"), "HF_TOKEN"),
    Kind("a Weights & Biases key (wandb_v1_...)", _token(r"wandb_v1_[\w-]{20,}"), "WANDB_API_KEY"),
    Kind(
        "an API key (sk-...)",
        _token(r"sk-(?:[A-Za-z0-9]{32,}|(?:proj|svcacct|admin|ant-[a-z]+\d+|or-v\d)-[\w-]{40,})"),
        "OPENAI_API_KEY or ANTHROPIC_API_KEY",
    ),
    Kind("a GitHub token (ghp_..., gho_...)", _token(r"gh[pousr]_[A-Za-z0-9]{30,}"), "GITHUB_TOKEN"),
    Kind("a GitHub token (github_pat_...)", _token(r"github_pat_\w{40,}"), "GITHUB_TOKEN"),
    Kind("a GitLab token (glpat-...)", _token(r"glpat-[\w-]{20,}"), "GITLAB_TOKEN"),
    Kind("an AWS key (AKIA...)", _token(r"A[KS]IA[A-Z0-9]{16}(?![A-Za-z0-9])"), "AWS_ACCESS_KEY_ID"),
    Kind("a Google API key (AIza...)", _token(r"AIza[\w-]{35}"), "GOOGLE_API_KEY"),
    Kind("a Slack token (xox...)", _token(r"xox[a-z]-[A-Za-z0-9-]{20,}"), "SLACK_TOKEN"),
    Kind(
        "a JSON web token (eyJ...)",
        re.compile(r"(?<![\w-])-{0,2}(?:hf_(?:oauth|jwt)_)?eyJ[\w-]{10,}\.eyJ[\w-]{6,}(?:\.[\w-]*)?", re.ASCII),
        "HF_TOKEN or MLFLOW_TRACKING_TOKEN",
    ),
    Kind(
        "a URL with a password (user:password@...)",
        re.compile(r"(?:(?<=://)|(?<=:/)(?!/))[^\s/?#@:]*:[^\s/?#@]+(?=@)"),
        "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
    ),
)
"""Every look that is known; a line of its own for each provider."""


def secret_error(text: str) -> str | None:
    """Return what is wrong with a text that holds a secret and what to do instead, without the secret; None for others."""
    for kind in KINDS:
        if kind.pattern.search(text):
            return f"looks like {kind.name}; secrets come from the environment only: remove it and set {kind.instead}"
    for name, value in _set_values().items():
        if value in text:
            return (
                f"holds the value of {name}; secrets come from the environment only: remove it, {name} is set already"
            )
    return None


def redact(text: str) -> str:
    """Return a text without any secret: what looks like one, and the values of the variables that are set."""
    for value in sorted(_set_values().values(), key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    while (rest := _without_tokens(text)) != text:  # one that follows another at once begins a word only now
        text = rest
    return text


class RedactingFormatter(logging.Formatter):
    """Formats a record as its base does, traceback and all, and leaves the secrets out."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a record."""
        return redact(super().format(record))


def _without_tokens(text: str) -> str:
    for kind in KINDS:
        text = kind.pattern.sub(HIDDEN, text)
    return text


def _set_values() -> dict[str, str]:
    """Return the secret variables that are set, with their values."""
    values = {name: os.environ.get(name, "").strip() for name in VARIABLES}
    return {name: value for name, value in values.items() if len(value) >= SHORTEST_VALUE}

"""Secrets come from the environment only: recognised by their format or by the values of set variables, and redacted.

Each provider's tokens have a prefix, an alphabet and a length, which separate them from names such as ``sk-learn`` or
``hf_data``. Passwords have no format; they are known by value if a variable of `VARIABLES` holds them. Unlisted formats and
secrets inside training data are not found.
"""

import logging
import os
import re

from qlora_train.utils.trackers import TRACKERS

HIDDEN = "[secret]"
MIN_VALUE_LENGTH = 6
"""Shorter values of variables occur in any text."""

VARIABLES = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", *(name for tracker in TRACKERS.values() for name in tracker.secrets),
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "GOOGLE_API_KEY",
    "AZURE_CLIENT_SECRET", "AZURE_STORAGE_KEY", "AZURE_STORAGE_CONNECTION_STRING", "OPENAI_API_KEY",
    "ANTHROPIC_API_KEY", "GITHUB_TOKEN", "GH_TOKEN", "GITLAB_TOKEN", "SLACK_TOKEN",
)  # fmt: skip
"""Environment variables whose values are secret."""

_WORD_START = r"(?<![A-Za-z0-9])"
FORMATS = {
    "a Hugging Face token (hf_...)": (_WORD_START + r"(?:hf|api_org)_[A-Za-z0-9]{30,}", "HF_TOKEN"),
    "a Weights & Biases key (wandb_v1_...)": (_WORD_START + r"wandb_v1_[\w-]{20,}", "WANDB_API_KEY"),
    "an API key (sk-...)": (
        _WORD_START + r"sk-(?:[A-Za-z0-9]{32,}|(?:proj|svcacct|admin|ant-[a-z]+\d+|or-v\d)-[\w-]{40,})",
        "OPENAI_API_KEY or ANTHROPIC_API_KEY",
    ),
    "a GitHub token (ghp_..., gho_...)": (_WORD_START + r"gh[pousr]_[A-Za-z0-9]{30,}", "GITHUB_TOKEN"),
    "a GitHub token (github_pat_...)": (_WORD_START + r"github_pat_\w{40,}", "GITHUB_TOKEN"),
    "a GitLab token (glpat-...)": (_WORD_START + r"glpat-[\w-]{20,}", "GITLAB_TOKEN"),
    "an AWS key (AKIA...)": (_WORD_START + r"A[KS]IA[A-Z0-9]{16}(?![A-Za-z0-9])", "AWS_ACCESS_KEY_ID"),
    "a Google API key (AIza...)": (_WORD_START + r"AIza[\w-]{35}", "GOOGLE_API_KEY"),
    "a Slack token (xox...)": (_WORD_START + r"xox[a-z]-[A-Za-z0-9-]{20,}", "SLACK_TOKEN"),
    "a JSON web token (eyJ...)": (
        r"(?<![\w-])-{0,2}(?:hf_(?:oauth|jwt)_)?eyJ[\w-]{10,}\.eyJ[\w-]{6,}(?:\.[\w-]*)?",
        "HF_TOKEN or MLFLOW_TRACKING_TOKEN",
    ),
    "a URL with a password (user:password@...)": (
        r"(?:(?<=://)|(?<=:/)(?!/))[^\s/?#@:]*:[^\s/?#@]+(?=@)",
        "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
    ),
}
"""What a secret looks like -> its pattern and the environment variable to use instead."""
_PATTERNS = {name: re.compile(pattern, re.ASCII) for name, (pattern, _) in FORMATS.items()}


def secret_error(text: str) -> str | None:
    """Return an error message, without the secret, if a text holds one; else None."""
    for name, pattern in _PATTERNS.items():
        if pattern.search(text):
            return f"looks like {name}; secrets come from the environment only: remove it and set {FORMATS[name][1]}"
    for name, value in _set_values().items():
        if value in text:
            return (
                f"holds the value of {name}; secrets come from the environment only: remove it, {name} is set already"
            )
    return None


def redact(text: str) -> str:
    """Replace all secrets in a text."""
    for value in sorted(_set_values().values(), key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    before = ""
    while text != before:  # a replacement can make the next token start a word
        before = text
        for pattern in _PATTERNS.values():
            text = pattern.sub(HIDDEN, text)
    return text


class RedactingFormatter(logging.Formatter):
    """Redacts the formatted record, its traceback included."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def _set_values() -> dict[str, str]:
    values = {name: os.environ.get(name, "").strip() for name in VARIABLES}
    return {name: value for name, value in values.items() if len(value) >= MIN_VALUE_LENGTH}

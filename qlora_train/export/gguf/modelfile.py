"""The Modelfile of Ollama beside a GGUF file: which file, which prompt, which system prompt, and where answers end.

Ollama does not read the Jinja template inside a GGUF file. Without TEMPLATE it looks for a stock one that resembles it, or
sends the bare question; so a TEMPLATE is written where it can be proven equal, and otherwise a comment says that and why.
SYSTEM is what the training rows share: a model that has learnt to answer under one system prompt answers worse without.
"""

import datetime
import json
import logging
import re
from typing import Any

from qlora_train.data.chat_template import render_chat
from qlora_train.evaluation.generation import answer_end_ids
from qlora_train.export.gguf.go_template import UnsupportedTemplateError, find_separators

logger = logging.getLogger(__name__)


def modelfile(tokenizer: Any, *, model: str, adapter: str | None, adds_bos: bool, system: str = "") -> str:
    """Return the text of a Modelfile.

    Args:
        tokenizer: that of the trained model, with its chat template.
        model: path of the base or merged model, relative to the Modelfile.
        adapter: path of the adapter over it.
        adds_bos: whether the model's file makes every program put the beginning token before a prompt.
        system: the system prompt of the training rows, empty for none.
    """
    lines = [f"FROM {model}"]
    if adapter is not None:
        lines.append(f"ADAPTER {adapter}")
    lines += [*_template(tokenizer, adds_bos), *_system(system), *_stops(tokenizer)]
    return "\n".join(lines) + "\n"


def _template(tokenizer: Any, adds_bos: bool) -> list[str]:
    jinja = tokenizer.get_chat_template() if tokenizer.chat_template else ""
    today = datetime.date.today()
    try:
        separators, differences = find_separators(
            lambda turns: render_chat(tokenizer, turns, date=today, add_generation_prompt=True), jinja
        )
        if adds_bos:
            separators = separators.without_bos(tokenizer.bos_token)
    except UnsupportedTemplateError as reason:
        logger.warning(
            "Modelfile: no TEMPLATE: %s; run the file with llama.cpp (--jinja), which reads its own template", reason
        )
        return [f"# No TEMPLATE: {reason}. llama.cpp (--jinja) reads the template inside the file."]
    for difference in differences:
        logger.warning("Modelfile: TEMPLATE is the model's own but for %s", difference)
    return ['TEMPLATE """' + separators.go_template() + '"""']


def _system(text: str) -> list[str]:
    """Return the line for a system prompt. Ollama knows no escapes: it ends a text at a line that ends with quotes, and
    drops characters that are not printable.
    """
    if not text:
        return []
    *lines, last = re.split(r"[\r\n]", text)
    ends_early = any(line.rstrip().endswith('"""') for line in lines)
    if ends_early or not "".join([*lines, last]).replace("\t", " ").isprintable():
        reason = "the system prompt of the training rows holds what a Modelfile cannot; set it in the client"
        logger.warning("Modelfile: no SYSTEM: %s", reason)
        return [f"# No SYSTEM: {reason}."]
    logger.info("Modelfile: SYSTEM is the system prompt of the training rows")
    return [f'SYSTEM """{text}"""']


def _stops(tokenizer: Any) -> list[str]:
    texts = tokenizer.convert_ids_to_tokens(answer_end_ids(tokenizer))
    return [f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}" for text in texts]

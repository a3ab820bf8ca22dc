"""Write the Modelfile of Ollama for a GGUF file: model, adapter, prompt template, system prompt and stop tokens.

Ollama ignores the Jinja template inside a GGUF file. Without TEMPLATE it picks a stock one that looks alike, or sends the
bare question. TEMPLATE is written if it is proven equal; else a comment gives the reason. SYSTEM is the shared system
prompt of the training rows, without which the model answers worse.
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
        model: path of the base or merged model, relative to the Modelfile.
        adapter: path of the adapter; None for none.
        adds_bos: whether the model's file makes every program add the bos token.
        system: shared system prompt of the training rows; empty for none.
    """
    adapters = [] if adapter is None else [f"ADAPTER {adapter}"]
    ends = tokenizer.convert_ids_to_tokens(answer_end_ids(tokenizer))
    stops = [f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}" for text in ends]
    return "\n".join([f"FROM {model}", *adapters, _template(tokenizer, adds_bos), *_system(system), *stops]) + "\n"


def _template(tokenizer: Any, adds_bos: bool) -> str:
    jinja = tokenizer.get_chat_template() if tokenizer.chat_template else ""
    today = datetime.date.today()
    try:
        separators, differences = find_separators(
            lambda turns: render_chat(tokenizer, turns, date=today, add_generation_prompt=True), jinja
        )
        if adds_bos:
            separators = separators.without_bos(tokenizer.bos_token)
    except UnsupportedTemplateError as reason:
        logger.warning("Modelfile: no TEMPLATE (%s); llama.cpp --jinja reads the template in the file", reason)
        return f"# No TEMPLATE: {reason}. llama.cpp (--jinja) reads the template inside the file."
    for difference in differences:
        logger.warning("Modelfile: TEMPLATE differs from the model's own for %s", difference)
    return f'TEMPLATE """{separators.go_template()}"""'


def _system(text: str) -> list[str]:
    if not text:
        return []
    # Ollama has no escapes: it ends a text at a line that ends with quotes, and drops unprintable characters
    *lines, last = re.split(r"[\r\n]", text)
    ends_early = any(line.rstrip().endswith('"""') for line in lines)
    if ends_early or not "".join([*lines, last]).replace("\t", " ").isprintable():
        reason = "a Modelfile cannot hold the system prompt of the training rows; set it in the client"
        logger.warning("Modelfile: no SYSTEM (%s)", reason)
        return [f"# No SYSTEM: {reason}."]
    logger.info("Modelfile: SYSTEM is the system prompt of the training rows")
    return [f'SYSTEM """{text}"""']

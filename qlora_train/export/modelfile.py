"""The Modelfile of Ollama beside a GGUF file: which file, which prompt, and where answers end.

Ollama does not read the Jinja template inside a GGUF file. Without TEMPLATE it looks for a stock one that resembles it, or
sends the bare question; so a TEMPLATE is written where it can be proven equal, and otherwise a comment says that and why.
"""

import datetime
import json
import logging
from typing import Any

from qlora_train.data.chat import render_chat
from qlora_train.evaluate import answer_ends
from qlora_train.export.go_template import NotOfThisFormError, find_joints

logger = logging.getLogger(__name__)


def modelfile(tokenizer: Any, *, model: str, adapter: str | None, adds_bos: bool) -> str:
    """Return the text of a Modelfile.

    Args:
        tokenizer: that of the trained model, with its chat template.
        model: path of the base or merged model, relative to the Modelfile.
        adapter: path of the adapter over it.
        adds_bos: whether the model's file makes every program put the beginning token before a prompt.
    """
    lines = [f"FROM {model}"]
    if adapter is not None:
        lines.append(f"ADAPTER {adapter}")
    lines += [*_template(tokenizer, adds_bos), *_stops(tokenizer)]
    return "\n".join(lines) + "\n"


def _template(tokenizer: Any, adds_bos: bool) -> list[str]:
    jinja = tokenizer.get_chat_template() if tokenizer.chat_template else ""
    today = datetime.date.today()
    try:
        joints, differences = find_joints(
            lambda turns: render_chat(tokenizer, turns, date=today, add_generation_prompt=True), jinja
        )
        if adds_bos:
            joints = joints.without_bos(tokenizer.bos_token)
    except NotOfThisFormError as reason:
        logger.warning(
            "Modelfile: no TEMPLATE: %s; run the file with llama.cpp (--jinja), which reads its own template", reason
        )
        return [f"# No TEMPLATE: {reason}. llama.cpp (--jinja) reads the template inside the file."]
    for difference in differences:
        logger.warning("Modelfile: TEMPLATE is the model's own but for %s", difference)
    return ['TEMPLATE """' + joints.go_template() + '"""']


def _stops(tokenizer: Any) -> list[str]:
    texts = tokenizer.convert_ids_to_tokens(answer_ends(tokenizer))
    return [f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}" for text in texts]

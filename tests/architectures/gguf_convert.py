"""Convert model folders with llama.cpp's own classes, in a process of its own: `python gguf_convert.py LLAMA_CPP < JOBS`.

The numbers of a model do not depend on how text is split, and the converter knows tokenizers by name only. So every
vocabulary is written as byte-level BPE, which the tokenizers of pico models are. JOBS is a JSON list of [folder, file];
printed is one of what went wrong with each, "" where nothing did.
"""

import json
import logging
import sys
from pathlib import Path

sys.path[:0] = [sys.argv[1], f"{sys.argv[1]}/gguf-py"]

import gguf  # noqa: E402
import torch  # noqa: E402
from conversion import (  # noqa: E402
    ModelBase,
    ModelType,
    TextModel,
    get_model_architecture,
    get_model_class,
    logger,
)  # fmt: skip


def convert(folder: Path, file: Path) -> str:
    """Write `file` in float32 and return the error message."""
    architecture = get_model_architecture(ModelBase.load_hparams(folder, False), ModelType.TEXT)
    try:
        kind = get_model_class(architecture)
    except NotImplementedError:
        return "the converter does not know it"
    kind.set_vocab = TextModel._set_vocab_gpt2
    TextModel.get_vocab_base_pre = lambda _self, _tokenizer: "gpt-2"
    kind.no_mtp = kind.supports_mtp_export  # pico models have no layers that predict tokens further on
    try:
        kind(folder, gguf.LlamaFileType.ALL_F32, file, model_name="pico").write()
    except Exception as error:
        text = str(error).splitlines()
        return f"the converter fails: {type(error).__name__}: {text[0] if text else ''}"
    return ""


def main() -> None:
    logger.setLevel(logging.CRITICAL)
    logging.disable(logging.CRITICAL)
    with torch.inference_mode():
        problems = [convert(Path(folder), Path(file)) for folder, file in json.load(sys.stdin)]
    print(json.dumps(problems))


if __name__ == "__main__":
    main()

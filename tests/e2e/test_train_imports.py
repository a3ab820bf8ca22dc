"""What a run imports of the package: no part that it does not use."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_train.config.writer import to_yaml
from qlora_train.planning.base_and_data import inspect
from tests.support.runs import make_config
from tests.support.source_tree import FILES, PACKAGE

MAX_SHARE = 0.68
"""Of the package, for a run whose rows are tokenised already."""
UNUSED = (
    "export.merging", "export.gguf", "export.vllm", "export.hub_upload", "export.export_run", "inference",
    "adapters.eva", "evaluation.held_out_preferences", "objectives.preference_loss",
    "evaluation.held_out_unpaired", "objectives.kto_loss", "training.step_kl", "training.chosen_logps",
    "models.shard_base", "models.shard_reads", "kernels.sharded_weights",
    "models.gguf_base", "models.legacy_bin", "models.prequantized", "models.remote_code", "data.streaming",
    "evaluation.reference_pass", "objectives.reference_logps", "runs.reference_files", "training.stored_reference",
    "data.preference_rows", "data.pretokenized", "data.readers.arrow", "data.readers.csv_table",
    "data.readers.json_list", "data.readers.parquet", "training.memory.activation_offloading",
)  # fmt: skip
"""Parts that neither the settings nor the data of this run ask for."""
TOKENIZATION = ("data.tokenize_chunk", "data.row_encoder", "data.masking", "data.row_reader", "data.format_readers")
CODE = """
import sys
from qlora_train.cli.main import main
if __name__ == "__main__":
    assert main(["train", sys.argv[1]]) == 0
    print(*[name.partition(".")[2] for name in sys.modules if name.startswith("qlora_train.")])
"""


@pytest.fixture(scope="module")
def imported(pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Modules of the package that the process of a run has at its end."""
    folder = tmp_path_factory.mktemp("imports")
    config = make_config(folder, pico_llama, "train.max_steps=1", f"data.cache_dir={folder / 'cache'}")
    inspect(config, num_shown=0)  # tokenises the rows
    script, file = folder / "script.py", folder / "resolved.yaml"
    script.write_text(CODE)
    file.write_text(to_yaml(config))
    done = subprocess.run(
        [sys.executable, str(script), str(file)], check=True, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
    )  # fmt: skip
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("name", [*UNUSED, *TOKENIZATION])
def test_a_run_does_not_import_what_it_does_not_use(imported: set[str], name: str) -> None:
    path = PACKAGE / name.replace(".", "/")
    assert path.is_dir() or path.with_suffix(".py").is_file()
    assert {module for module in imported if f"{module}.".startswith(f"{name}.")} == set()


def test_a_run_imports_two_thirds_of_the_package(imported: set[str]) -> None:
    assert {"training.qlora_trainer", "kernels.lora_linear", "export.adapter_check"} <= imported
    assert len(imported) <= MAX_SHARE * len(FILES), sorted(imported)

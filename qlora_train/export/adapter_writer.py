"""Write a trained adapter in PEFT's format, with its tokenizer and model card."""

import logging
from typing import Any

from qlora_train.adapters import AdaptedModel
from qlora_train.config import RunConfig
from qlora_train.data import PreparedData
from qlora_train.export.model_card import adapter_loading, clean_adapter_config, write_card
from qlora_train.models.tokenizer import save_tokenizer
from qlora_train.runs import RunFolder
from qlora_train.utils import atomic_io

logger = logging.getLogger(__name__)


def write_adapter(
    folder: RunFolder, adapted: AdaptedModel, config: RunConfig, data: PreparedData, result: dict[str, Any]
) -> None:
    """Save the adapter in PEFT's format with its tokenizer and card; this finishes the run."""
    loaded = adapted.loaded
    source, trust_remote_code = loaded.source, config.model.trust_remote_code
    folder.delete_results()
    recorded = folder.metadata()
    metadata = {"run_id": recorded["run_id"], "num_changes": len(recorded["changes"])}
    with atomic_io.atomic_folder(folder.adapter, metadata) as staging:
        # "auto" guesses offline that resized embeddings were not modified; new rows are saved by their own tensors
        adapted.model.save_pretrained(str(staging), save_embedding_layers=False)
        save_tokenizer(loaded.tokenizer, staging, trust_remote_code=trust_remote_code)
        clean_adapter_config(staging, source.name, source.revision)
        write_card(
            staging, base=source.name, revision=source.revision, config=config,
            metrics={key: float(result[key]) for key in ("train_loss", "eval_loss") if result[key] is not None},
            num_train_rows=data.num_train_rows, kind="adapter",
            loading=adapter_loading(loaded, config, folder.system_prompt()),
        )  # fmt: skip
        folder.add_results(training=result, quantization=loaded.quantization_summary.to_json())
    logger.info("adapter: %s (step %d)", folder.adapter, result["taken_from_step"])

"""Export a finished run as GGUF, for llama.cpp and Ollama: the merged model, the adapter or the base.

Each format and number format has its own folder in ``RUN/export``, written atomically::

    export/gguf-q4_k_m/    NAME-q4_k_m.gguf, Modelfile, results.json
    export/lora-gguf-f16/  NAME-lora-f16.gguf, Modelfile
    export/base-gguf-f16/  BASE-f16.gguf, which the adapter is applied to

Every file is read back and compared with its source weights before the folder gets its name.
"""

import logging
import tempfile
from pathlib import Path
from typing import Any

from qlora_train.config import RunConfig
from qlora_train.export.export_formats import ExportRequest
from qlora_train.export.gguf.convert_model import load_tokenizer
from qlora_train.export.gguf.converter import LORA_SCRIPT, find_converter
from qlora_train.export.gguf.gguf_check import GGUFFile, Source
from qlora_train.export.gguf.gguf_vocabulary import adds_bos
from qlora_train.export.gguf.lora_cost import measure_adapter
from qlora_train.export.gguf.modelfile import modelfile
from qlora_train.export.gguf.plain_lora import write_plain_adapter
from qlora_train.export.gguf.quant_cost import find_meter
from qlora_train.export.gguf.quant_export import RESULTS, ExportedModel, write_quants
from qlora_train.export.merging.adapter_deltas import AdapterFile
from qlora_train.export.merging.meta_model import build_meta_model
from qlora_train.export.model_card import public_name
from qlora_train.models import BaseSource
from qlora_train.models.loading import model_config
from qlora_train.runs import RunFolder, read_json, write_json
from qlora_train.utils import atomic_io
from qlora_train.utils.errors import ExportError

logger = logging.getLogger(__name__)

MODELFILE = "Modelfile"


def export_merged(request: ExportRequest) -> list[Path]:
    """Write the merged model of a run as GGUF, with a Modelfile and what each number format costs.

    Raises:
        ExportError: the conversion failed, or the file differs from the model.
    """
    run, name = request.run, _run_name(request.run)
    _check_scaling(request.config)
    tokenizer = load_tokenizer(run.merged, request.config)

    def write_modelfile(staging: Path, file: GGUFFile) -> None:
        text = modelfile(
            tokenizer, model=f"./{file.path.name}", adapter=None, adds_bos=file.adds_bos(), system=run.system_prompt()
        )
        (staging / MODELFILE).write_text(text, encoding="utf-8")

    model = ExportedModel("gguf", run.merged, tokenizer, name=name, texts=_texts(run), finish=write_modelfile)
    written = write_quants(run, model, request.options, find_converter(request.options.llama_cpp), measured=True)
    for quant, folder in zip(request.options.quants, written, strict=True):
        tag = name if len(written) == 1 else f"{name}:{quant}"
        logger.info("Ollama: ollama create %s -f %s", tag, folder / MODELFILE)
    return written


def export_base(request: ExportRequest) -> list[Path]:
    """Write the base of a run as GGUF, with the run's RoPE scaling, for an adapter that is applied to it.

    Raises:
        ExportError: the conversion failed, or the file differs from the model.
    """
    run, config, source = request.run, request.config, request.source
    assert source is not None, "the format needs the base"
    _check_scaling(config)
    scaled = model_config(source, config.model).to_dict() if config.model.rope_scaling else None
    tokenizer = load_tokenizer(source.folder, config)
    model = ExportedModel(
        "base-gguf", source.folder, tokenizer, name=_last_name(source), texts=_texts(run), config=scaled
    )
    return write_quants(run, model, request.options, find_converter(request.options.llama_cpp), measured=False)


def export_adapter(request: ExportRequest) -> list[Path]:
    """Write the adapter of a run as GGUF, for ``--lora`` of llama.cpp, with a Modelfile.

    Raises:
        ExportError: the adapter is not plain LoRA, the conversion failed, or the file differs from the adapter.
    """
    assert request.source is not None, "the format needs the base"
    _check_scaling(request.config)
    return [_export_adapter(request, request.source, quant) for quant in request.options.quants]


def _export_adapter(request: ExportRequest, source: BaseSource, quant: str) -> Path:
    run, config = request.run, request.config
    final, name = run.exports / f"lora-gguf-{quant}", _run_name(run)
    meta_model = build_meta_model(model_config(source, config.model), trust_remote_code=config.model.trust_remote_code)
    base_file = run.exports / "base-gguf-f16" / _base_file(source, "f16")
    base = f"../{base_file.parent.name}/{base_file.name}"
    own_file = None if config.model.rope_scaling else source.gguf_file  # which has no RoPE scaling of a run
    if own_file is not None:
        base_file, base = own_file, str(own_file)
    with atomic_io.atomic_folder(final, {"format": "lora-gguf", "quant": quant}) as staging:
        path = staging / f"{name}-lora-{quant}.gguf"
        with tempfile.TemporaryDirectory(dir=staging) as plain:
            tensors = write_plain_adapter(AdapterFile(run.adapter, meta_model), Path(plain), name)
            settings = ["--base", str(source.folder), "--outfile", str(path), "--outtype", quant]
            find_converter(request.options.llama_cpp).run(LORA_SCRIPT, [plain, *settings], what=run.adapter)
        check = GGUFFile(path).check([_lora_source(key, tensor) for key, tensor in tensors.items()], quant)
        text = modelfile(
            load_tokenizer(run.adapter, config), model=base,
            adapter=f"./{path.name}", adds_bos=adds_bos(load_tokenizer(source.folder, config)),
            system=run.system_prompt(),
        )  # fmt: skip
        (staging / MODELFILE).write_text(text, encoding="utf-8")
        if own_file is not None:
            run.add_results(
                export=run.read_results().get("export", {}) | {final.name: _measure(request, own_file, path)}
            )
    logger.info("%s: %s", final / path.name, check.summary())
    _log_limits(run, config, path.name, base_file)
    logger.info("Ollama: ollama create %s -f %s", name, final / MODELFILE)
    return final


def _measure(request: ExportRequest, base_file: Path, adapter: Path) -> dict[str, Any]:
    """Write the adapter's loss on the run's own GGUF file beside the adapter, and return it."""
    meter = find_meter(
        request.run, load_tokenizer(request.run.adapter, request.config), request.options.max_eval_minutes
    )
    measured = {} if meter is None else measure_adapter(request.run, meter, base_file, adapter)
    entry = {"file": adapter.name, "base": base_file.name, **measured}
    write_json(adapter.parent / RESULTS, entry)
    return entry


def _log_limits(run: RunFolder, config: RunConfig, file: str, base_file: Path) -> None:
    if config.model.rope_scaling:
        logger.warning(
            "%s: apply it to the base with the run's RoPE scaling (model.rope_scaling), as --format base-gguf writes it",
            file,
        )
    if not base_file.exists():
        logger.info("its base as GGUF: qlora-train export %s --format base-gguf", run.path)
    if run.read_results().get("merge", {}).get("merge_base") == "dequantized":
        logger.warning(
            "GGUF: the merge measured a lower loss on the dequantized base than on the 16-bit base, which llama.cpp "
            "applies the adapter to; compare, or use --format gguf"
        )


def _check_scaling(config: RunConfig) -> None:
    if (config.model.rope_scaling or {}).get("rope_type") == "dynamic":
        raise ExportError(
            "model.rope_scaling: llama.cpp does not support dynamic RoPE scaling; use the folder with Transformers or "
            "vLLM, or train with linear or yarn"
        )


def _texts(run: RunFolder) -> list[str]:
    """Return the run's first rows as text."""
    rows = read_json(run.data_report_file).get("first_rows", [])
    return ["".join(segment["text"] for segment in row["segments"]) for row in rows]


def _last_name(source: BaseSource) -> str:
    return public_name(source.name).rpartition("/")[2]


def _base_file(source: BaseSource, quant: str) -> str:
    return f"{_last_name(source)}-{quant}.gguf"


def _run_name(run: RunFolder) -> str:
    return run.path.resolve().name


def _lora_source(key: str, tensor: Any) -> Source:
    module, _, kind = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
    return Source(f"{module}.weight", lambda: tensor, f".{kind.lower()}")

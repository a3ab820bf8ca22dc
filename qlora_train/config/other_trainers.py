"""Names of settings in other trainers, for error messages."""

OTHER_NAMES = {
    **dict.fromkeys(("base_model", "model_id", "model_name"), "model.model_name_or_path"),
    **dict.fromkeys(("template", "prompt_template"), "model.chat_template"),
    **dict.fromkeys(("flash_attention", "flash_attn"), "model.attn_implementation"),
    **dict.fromkeys(("quantization_bit", "load_in_4_bit"), "quantization.load_in_4bit"),
    **dict.fromkeys(("lora_r", "rank", "lora_rank"), "lora.r"),
    **dict.fromkeys(("lora_target", "lora_target_modules"), "lora.target_modules"),
    **dict.fromkeys(("dataset", "datasets", "dataset_name"), "data.train"),
    **dict.fromkeys(("val_size", "val_set_size"), "data.eval"),
    **dict.fromkeys(("cutoff_len", "max_seq_len", "max_seq_length", "sequence_len"), "data.max_length"),
    **dict.fromkeys(("train_on_inputs", "train_on_prompt"), "data.train_on"),
    **dict.fromkeys(("clip_grad_norm", "gradient_clipping"), "train.max_grad_norm"),
    **dict.fromkeys(("eval_strategy", "evaluation_strategy"), "train.eval_steps"),
    **dict.fromkeys(("batch_size", "micro_batch_size"), "train.per_device_train_batch_size"),
    "sample_packing": "data.packing",
    "lr": "train.learning_rate",
    "warmup_steps": "train.warmup_ratio",
    "save_strategy": "train.save_steps",
    "optimizer": "train.optim",
    "wandb_project": "run.report_to",
}
"""Name in another trainer -> `section.key`."""
UNSUPPORTED = {
    "load_in_8bit": "the base is stored in 4 bits, or in 16 with quantization.load_in_4bit: false",
    "fp8": "training in float8 is not supported; remove it: quantization.bnb_4bit_compute_dtype sets the compute dtype",
}
"""Settings without an equivalent -> the alternative."""

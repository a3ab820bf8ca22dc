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
    **dict.fromkeys(("distributed_type", "fsdp", "fsdp_config", "ddp", "data_parallel"), "parallel.strategy"),
    **dict.fromkeys(("num_processes", "nproc_per_node", "num_gpus", "n_gpu", "world_size"), "parallel.processes"),
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
    **dict.fromkeys(
        ("deepspeed", "deepspeed_config", "zero_stage"),
        "DeepSpeed is not used: under it every process loads the whole model (DeepSpeed#5637); remove it: "
        "parallel.strategy divides the work",
    ),
    **dict.fromkeys(
        ("context_parallel_size", "sequence_parallel_degree", "sequence_parallel_size", "cp_size", "sp_size"),
        "no row is divided over GPUs; remove it: lower data.max_length, or use train.activation_offloading",
    ),
    **dict.fromkeys(
        ("tensor_parallel_size", "tp_size", "pipeline_parallel_size", "pp_size"),
        "no layer is computed by several GPUs; remove it: parallel.strategy divides the rows",
    ),
    "fp8": "training in float8 is not supported; remove it: quantization.bnb_4bit_compute_dtype sets the compute dtype",
}
"""Settings without an equivalent -> the alternative."""

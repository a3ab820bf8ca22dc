# here: train.objective=simpo train.beta=2 train.simpo_gamma=1 train.sft_weight=0.5 data.train[0].path=data/pairs.jsonl
# here: lora.target_modules=all-linear data.max_length=2048 lora.r=8 lora.lora_alpha=32
# unneeded: train_type
swift rlhf --rlhf_type simpo --cpo_alpha 0.5 --model Qwen/Qwen2.5-7B-Instruct --train_type lora \
  --dataset data/pairs.jsonl --target_modules all-linear --max_length 2048 --use_hf true --output_dir output

# here: train.objective=dpo train.beta=0.1 train.sft_weight=0.1 data.train[0].path=data/pairs.jsonl lora.r=8 train.learning_rate=1e-4
# here: lora.target_modules=all-linear data.max_length=2048 train.gradient_accumulation_steps=16
# here: quantization.load_in_4bit=false train.lr_scheduler_type=cosine
# unneeded: train_type
swift rlhf --rlhf_type dpo --beta 0.1 --rpo_alpha 0.1 --model Qwen/Qwen2.5-7B-Instruct --train_type lora \
  --dataset data/pairs.jsonl --target_modules all-linear --max_length 2048 --gradient_accumulation_steps 16 \
  --use_hf true --output_dir output

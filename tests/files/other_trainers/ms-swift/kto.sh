# here: train.objective=kto train.beta=0.3 train.desirable_weight=1.2 train.undesirable_weight=2
# here: data.train[0].path=data/feedback.jsonl data.max_length=2048 lora.r=8 lora.lora_alpha=32
# unneeded: train_type
swift rlhf --rlhf_type kto --beta 0.3 --desirable_weight 1.2 --undesirable_weight 2 --model Qwen/Qwen2.5-7B-Instruct \
  --train_type lora --dataset data/feedback.jsonl --max_length 2048 --use_hf true --output_dir output

#!/bin/bash
# here: model.model_name_or_path=Qwen/Qwen3-1.7B data.train[0].path=data/chat.jsonl quantization.load_in_4bit=true
# here: lora.r=16 train.per_device_train_batch_size=4 run.seed=3 data.packing=true
# here: train.load_best_model_at_end=true train.eval_steps=50 train.save_steps=50 data.eval=0.1
# here: lora.target_modules=[q_proj,k_proj]
# lost: pip install trl
# unneeded: CUDA_VISIBLE_DEVICES use_peft save_strategy
pip install trl
CUDA_VISIBLE_DEVICES=1 trl sft \
    --model_name_or_path Qwen/Qwen3-1.7B \
    --dataset_name data/chat.jsonl \
    --use_peft --load_in_4bit \
    --lora_target_modules q_proj k_proj \
    --per-device-train-batch-size 4 \
    --test_split_size=0.1 \
    --eval_strategy steps --eval_steps 50 \
    --save_strategy steps --save_steps 200 \
    --load_best_model_at_end \
    --packing \
    --seed 3 \
    --output_dir out

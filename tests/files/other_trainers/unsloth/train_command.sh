# here: model.model_name_or_path=unsloth/gemma-3-4b-it data.train[0].path=data/dialogues.jsonl data.format=conversations
# here: lora.r=32 quantization.load_in_4bit=false train.num_train_epochs=2 train.learning_rate=1e-4 data.packing=true
# here: train.per_device_train_batch_size=1 lora.lora_alpha=16 train.optim=adamw_8bit train.gradient_checkpointing=none
# lost: warmup_steps
# todo: training_type
unsloth train --model unsloth/gemma-3-4b-it --local-dataset data/dialogues.jsonl --format-type sharegpt \
  --no-load-in-4bit --lora-r 32 --num-epochs 2 --learning-rate 1e-4 --batch-size 1 --packing --warmup-steps 5 \
  --gradient-checkpointing none --training-type full

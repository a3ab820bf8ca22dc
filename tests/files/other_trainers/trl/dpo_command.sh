# here: train.objective=dpo data.train[0].path=trl-lib/ultrafeedback_binarized train.learning_rate=1e-6 lora.r=32
# here: lora.lora_alpha=16 quantization.load_in_4bit=true data.max_length=1024 train.per_device_train_batch_size=2
# here: train.gradient_accumulation_steps=8 lora.lora_dropout=0.05
trl dpo --model_name_or_path Qwen/Qwen2-0.5B-Instruct --dataset_name trl-lib/ultrafeedback_binarized --use_peft \
  --load_in_4bit --lora_r 32 --lora_alpha 16 --per_device_train_batch_size 2 --gradient_accumulation_steps 8 \
  --output_dir Qwen2-0.5B-DPO

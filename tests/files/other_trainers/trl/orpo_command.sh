# here: train.objective=orpo train.beta=0.2 data.train[0].path=trl-lib/ultrafeedback_binarized lora.r=16
# here: train.learning_rate=8e-6 quantization.load_in_4bit=true data.max_length=1024 train.max_steps=500
# lost: max_prompt_length
accelerate launch examples/scripts/orpo.py --model_name_or_path Qwen/Qwen2-0.5B --max_steps 500 --load_in_4bit \
  --dataset_name trl-lib/ultrafeedback_binarized --use_peft --lora_r 16 --lora_alpha 16 --beta 0.2 \
  --learning_rate 8e-6 --max_prompt_length 128 --output_dir Qwen2-0.5B-ORPO

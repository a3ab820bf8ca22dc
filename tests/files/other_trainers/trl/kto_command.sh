# here: train.objective=apo_zero_unpaired train.beta=0.2 train.undesirable_weight=1.2 lora.r=16 data.max_length=1024
# here: data.train[0].path=trl-lib/kto-mix-14k train.learning_rate=1e-6 quantization.load_in_4bit=true
# unneeded: command
trl kto --model_name_or_path Qwen/Qwen2-0.5B-Instruct --dataset_name trl-lib/kto-mix-14k --loss_type apo_zero_unpaired \
  --use_peft --lora_r 16 --lora_alpha 32 --load_in_4bit --beta 0.2 --undesirable_weight 1.2 --output_dir Qwen2-0.5B-KTO

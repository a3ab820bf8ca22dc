# here: model.model_name_or_path=unsloth/llama-3-8b data.max_length=8192 quantization.load_in_4bit=true lora.r=64
# here: lora.lora_alpha=32 lora.lora_dropout=0.1 lora.bias=none lora.use_rslora=true run.seed=3407 train.max_steps=400
# here: train.warmup_ratio=0.0125 train.learning_rate=2e-6 train.optim=adamw_8bit train.weight_decay=0.005
# here: train.lr_scheduler_type=linear run.report_to=[tensorboard] export.merge=true train.gradient_checkpointing=full
# here: train.per_device_train_batch_size=4 train.gradient_accumulation_steps=8 data.train[0].path=data/tasks.json
# lost: quantization push_model hub_path hub_token save_path
python unsloth-cli.py --model_name "unsloth/llama-3-8b" --max_seq_length 8192 --dtype None --load_in_4bit \
--dataset data/tasks.json \
--r 64 --lora_alpha 32 --lora_dropout 0.1 --bias "none" --use_gradient_checkpointing "unsloth" \
--random_state 3407 --use_rslora --per_device_train_batch_size 4 --gradient_accumulation_steps 8 \
--warmup_steps 5 --max_steps 400 --learning_rate 2e-6 --logging_steps 1 --optim "adamw_8bit" \
--weight_decay 0.005 --lr_scheduler_type "linear" --seed 3407 --output_dir "outputs" \
--report_to "tensorboard" --save_model --save_path "model" --quantization q8_0 q4_k_m \
--push_model --hub_path "hf/model" --hub_token "your_hf_token"

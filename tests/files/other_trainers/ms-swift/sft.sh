# here: model.model_name_or_path=Qwen/Qwen2.5-7B-Instruct quantization.load_in_4bit=true lora.r=8 lora.lora_alpha=32
# here: lora.target_modules=all-linear data.train[0].path=data/chat.jsonl data.train[0].num_rows=500
# here: data.train[1].path=AI-ModelScope/alpaca-gpt4-data-en data.train[1].num_rows=500 train.num_train_epochs=1
# here: train.per_device_train_batch_size=1 train.learning_rate=1e-4 train.gradient_accumulation_steps=32 train.eval_steps=50
# here: train.save_steps=50 train.save_total_limit=2 data.max_length=2048 train.warmup_ratio=0.05 data.eval=0.01
# here: quantization.bnb_4bit_compute_dtype=bfloat16 quantization.bnb_4bit_quant_type=nf4 train.weight_decay=0.1
# here: parallel.processes=2 train.adam_beta2=0.95 lora.lora_dropout=0.05
# lost: system model_author model_name
# todo: dataset
# unneeded: tuner_type quant_method dataloader_num_workers CUDA_VISIBLE_DEVICES
NPROC_PER_NODE=2 \
CUDA_VISIBLE_DEVICES=0,1 \
swift sft \
    --model Qwen/Qwen2.5-7B-Instruct \
    --tuner_type lora \
    --dataset 'data/chat.jsonl#500' \
              'AI-ModelScope/alpaca-gpt4-data-en#500' \
    --split_dataset_ratio 0.01 \
    --torch_dtype bfloat16 \
    --quant_method bnb --quant_bits 4 \
    --bnb_4bit_compute_dtype bfloat16 \
    --bnb_4bit_quant_type nf4 \
    --bnb_4bit_use_double_quant true \
    --num_train_epochs 1 \
    --per_device_train_batch_size 1 \
    --per_device_eval_batch_size 1 \
    --learning_rate 1e-4 \
    --lora_rank 8 \
    --lora_alpha 32 \
    --target_modules all-linear \
    --gradient_accumulation_steps 16 \
    --eval_steps 50 \
    --save_steps 50 \
    --save_total_limit 2 \
    --logging_steps 5 \
    --max_length 2048 \
    --output_dir output \
    --system 'You are a helpful assistant.' \
    --warmup_ratio 0.05 \
    --dataloader_num_workers 4 \
    --model_author swift \
    --model_name swift-robot

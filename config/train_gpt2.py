# GPT-2 124M on OpenWebText.
#
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
#
# Hardware: one machine with 8 GPUs of 40 GB or more. Needs: python data/openwebtext/prepare.py
# Duration: about 4 days on 8 x A100 (published for these settings; not measured here).
# Result: loss about 2.85 (published; not measured here).

out_dir = "out-gpt2"
wandb_log = False
wandb_project = "owt"
wandb_run_name = "gpt2-124M"

# 480 sequences, or 491,520 tokens, per step: 12 at a time on each of 8 GPUs, 5 times
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

max_iters = 600000  # 33 epochs of 9B tokens
lr_decay_iters = 600000

eval_interval = 1000
eval_iters = 200
log_interval = 10
weight_decay = 1e-1

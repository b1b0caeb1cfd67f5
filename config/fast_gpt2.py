# GPT-2 124M on OpenWebText by the modern recipe, with batches and steps as in the speed-runs.
#
#   torchrun --standalone --nproc_per_node=8 train.py config/fast_gpt2.py
#   python train.py config/fast_gpt2.py
#
# Hardware: eight GPUs, or one, of 80 GB (smaller: halve batch_size, double
# gradient_accumulation_steps). Needs: python data/openwebtext/prepare.py
# Duration: not measured here; 5,100 steps of 524,288 tokens are 2.7B tokens, a hundredth of
# train_gpt2.py's. The public speed-runs of October 2024 took about 15 minutes for as many of
# FineWeb on 8 x H100, to a validation loss of 3.28 (a model like this one; published there).
# Result: not measured here. 20 steps were run on a CPU, with n_embd = 48 and 4 sequences per step.

out_dir = "out-fast-gpt2"
wandb_project = "owt"
wandb_run_name = "fast-gpt2-124M"

# 512 sequences per step: 32 at a time, twice on each of 8 GPUs or 16 times on one
batch_size = 32
block_size = 1024
gradient_accumulation_steps = 16

n_layer = 12
n_head = 6  # heads of 128, a width that suits attention kernels
n_embd = 768

positions = "rotary"
qk_norm = True
activation = "relu2"
tie_weights = False
smear = True

optimizer = "muon"
learning_rate = 3.6e-3
weight_decay = 0.0  # less than one epoch: no overfitting
schedule = "linear"
cooldown_frac = 0.3
warmup_iters = 0
max_iters = 5100
lr_decay_iters = 5100
min_lr = 0.0

eval_interval = 250
eval_iters = 40
log_interval = 10

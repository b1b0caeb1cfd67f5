# Character-level Tiny Shakespeare on a CPU, to the loss of the usual model of 10M parameters.
#
#   python data/shakespeare_char/prepare.py
#   python train.py config/fast_shakespeare_char.py
#   python sample.py --out_dir=out-fast-shakespeare-char
#
# Hardware: 2 cores of an AMD EPYC with AVX512-BF16, bfloat16. Duration: 13 minutes.
# Result: validation loss 1.469 (the whole split). train_shakespeare_char.py is published with
# 1.4697, after about 3 minutes on an A100.

out_dir = "out-fast-shakespeare-char"
dataset = "shakespeare_char"
wandb_project = "shakespeare-char"
wandb_run_name = "fast-shakespeare-char"
eval_interval = 250
eval_iters = 0
log_interval = 10
gradient_accumulation_steps = 1
batch_size = 16
block_size = 256

n_layer = 4
n_head = 5
n_embd = 320

positions = "rotary"
qk_norm = True
smear = True
activation = "relu2"
tie_weights = False

optimizer = "muon"
learning_rate = 4e-3
schedule = "linear"
cooldown_frac = 0.8
warmup_iters = 0
max_iters = 1000
lr_decay_iters = 1000
min_lr = 0.0
beta2 = 0.99

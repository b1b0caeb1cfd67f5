# GPT-2 124M on OpenWebText by the modern recipe, with batches and steps as in the speed-runs.
#
#   torchrun --standalone --nproc_per_node=8 train.py config/fast_gpt2.py
#   python train.py config/fast_gpt2.py
#
# Hardware: eight GPUs, or one, of 80 GB (smaller: halve batch_size, double
# gradient_accumulation_steps). Needs: python data/openwebtext/prepare.py
# Duration: not measured here; 3,250 steps of 524,288 tokens are 1.7B tokens, a hundred and
# seventieth of train_gpt2.py's.
# Result: not measured here. 20 steps were run on a CPU, with n_embd = 48 and 4 sequences per step.
#
# Rates, decays, betas and schedule are those that the short form of the speed-runs publishes
# (modded-nanogpt, train_gpt_simple.py: validation loss 3.28 on FineWeb after 3,250 steps). What is
# different here, so that its figure does not carry over: the text; smear; rotary positions on whole
# heads, not halves; no softcap of the logits; projections that start at small random values, not
# zero; AdamW's eps of 1e-8, not 1e-10; embeddings that start at 0.02, not 1, and are not
# normalized, for which their rate of 0.7 became 0.014, the same fraction of the start.

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
muon_lr = 0.025
muon_weight_decay = 0.05
learning_rate = 0.015  # of vectors
embedding_lr = 0.014
head_lr = 0.004
weight_decay = 0.001
beta1 = 0.8
schedule = "linear"
cooldown_frac = 0.7
warmup_iters = 0
max_iters = 3250
lr_decay_iters = 3250
min_lr = 0.0

eval_interval = 250
eval_iters = 40
log_interval = 10

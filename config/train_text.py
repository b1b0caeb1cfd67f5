# Your own text in GPT-2's tokens, or a BPE of its own, on one GPU, by the modern recipe.
#
#   python data/text/prepare.py --input=FOLDER --name=mine --tokenizer=gpt2
#   python train.py config/train_text.py
#   python sample.py --out_dir=out-text
#
# Hardware: one GPU with 24 GB. Duration: not measured here; 57 minutes and 10 GB by
# python bench.py config/train_text.py --mode=plan --gpu="RTX 4090"
# Result: not measured here. 20 steps were run on a CPU, with n_embd = 48 and 4 sequences per step.

out_dir = "out-text"
dataset = "mine"
wandb_project = "text"
wandb_run_name = "text"
eval_interval = 250
eval_iters = 40
log_interval = 10
sample_every = 250

gradient_accumulation_steps = 4
batch_size = 16
block_size = 1024

n_layer = 12
n_head = 6
n_embd = 768
dropout = 0.1  # a text of less than 100 million tokens is read several times

positions = "rotary"
qk_norm = True
smear = True
activation = "relu2"

optimizer = "muon"
learning_rate = 3.6e-3
schedule = "linear"
cooldown_frac = 0.7
warmup_iters = 0
max_iters = 3000
lr_decay_iters = 3000
min_lr = 0.0

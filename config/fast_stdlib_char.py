# The demo: a character-level model of Python's standard library, by the modern recipe.
#
#   python data/stdlib_char/prepare.py
#   python train.py config/fast_stdlib_char.py
#   python sample.py --out_dir=out-fast-stdlib-char
#
# Hardware: 2 cores of an AMD EPYC without bfloat16 in hardware, float32. Duration: 105 seconds
# while other programs used the cores.
# Result: validation loss 1.325 (the whole split, --eval_iters=0) with the library of Python 3.11.7;
# train_stdlib_char.py reaches 1.61.

out_dir = "out-fast-stdlib-char"
dataset = "stdlib_char"
wandb_project = "stdlib-char"
wandb_run_name = "fast-stdlib-char"
eval_interval = 0  # only at the end
eval_iters = 20
log_interval = 25
sample_every = 50

gradient_accumulation_steps = 1
batch_size = 16
block_size = 128

n_layer = 3
n_head = 4
n_embd = 192

positions = "rotary"
qk_norm = True
activation = "relu2"
bigram = True

optimizer = "muon"
muon_momentum = 0.9
learning_rate = 8e-3
embedding_lr = 4e-3
schedule = "linear"
cooldown_frac = 0.7
warmup_iters = 0
max_iters = 250
lr_decay_iters = 250
min_lr = 0.0
beta2 = 0.95

device = "cpu"

# Character-level Tiny Shakespeare on a laptop's CPU, by the modern recipe.
#
#   python data/shakespeare_char/prepare.py
#   python train.py config/fast_shakespeare_char_cpu.py
#   python sample.py --out_dir=out-fast-shakespeare-char-cpu
#
# Hardware: 2 cores of an AMD EPYC without bfloat16 in hardware, float32. Duration: 23 seconds,
# start-up and evaluation included, in minutes in which the 2,000 steps of the classic setting took
# 142 to 144. Result: validation loss 1.845 (the whole split); 1.843 to 1.897 with seeds 1 to 10,
# 1.867 in their mean. train_shakespeare_char_cpu.py takes 2,000 steps to 1.908.

out_dir = "out-fast-shakespeare-char-cpu"
dataset = "shakespeare_char"
wandb_project = "shakespeare-char"
wandb_run_name = "fast-shakespeare-char-cpu"
eval_interval = 0  # only at the end
eval_iters = 0
log_interval = 10
sample_every = 50
gradient_accumulation_steps = 1
batch_size = 24
block_size = 64

n_layer = 2
n_head = 4
n_embd = 176

positions = "rotary"
qk_norm = True
bigram = True
activation = "relu2"

optimizer = "muon"
muon_lr = 0.025
muon_momentum = 0.85  # a run of few steps: average over fewer gradients
learning_rate = 1.2e-2
embedding_lr = 6e-3
schedule = "linear"
cooldown_frac = 0.7
warmup_iters = 0
max_iters = 100
lr_decay_iters = 100
min_lr = 0.0
beta2 = 0.95

device = "cpu"

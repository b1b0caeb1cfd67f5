# Tiny Shakespeare by characters, to the loss of the usual 10M-parameter model, on a CPU.
#
#   python data/shakespeare_char/prepare.py
#   python train.py config/fast_shakespeare_char.py
#   python sample.py --out_dir=out-fast-shakespeare-char
#
# Hardware: 2 cores of a 2.8 GHz Xeon, float32. Duration: 36 minutes, of which it stood still for 11
# (tests had the machine): about 1 second a step.
# Result: validation loss 1.469 (the whole split). train_shakespeare_char.py is published with
# 1.4697, after about 3 minutes on an A100.

out_dir = "out-fast-shakespeare-char"
dataset = "shakespeare_char"
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
decay_fraction = 0.8
warmup_iters = 0
max_iters = 1000
lr_decay_iters = 1000
min_lr = 0.0
beta2 = 0.99

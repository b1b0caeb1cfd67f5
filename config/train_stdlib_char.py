# A character-level model of Python's standard library, which needs no download.
#
#   python data/stdlib_char/prepare.py
#   python train.py config/train_stdlib_char.py
#   python sample.py --out_dir=out-stdlib-char
#
# Hardware: 2 cores of a 2.8 GHz Xeon. Duration: 75 seconds.
# Result: validation loss 1.58 (20 batches), 1.61 (the whole split, --eval_iters=0), with the
# library of Python 3.11.7; that of another version differs a little.

out_dir = "out-stdlib-char"
dataset = "stdlib_char"
wandb_project = "stdlib-char"
wandb_run_name = "train-stdlib-char"
eval_interval = 250
eval_iters = 20
log_interval = 50

gradient_accumulation_steps = 1
batch_size = 12
block_size = 64

n_layer = 4
n_head = 4
n_embd = 128

learning_rate = 3e-3
max_iters = 1500
lr_decay_iters = 1500
min_lr = 3e-4
beta2 = 0.99  # few tokens per step: average over more steps
warmup_iters = 100

device = "cpu"

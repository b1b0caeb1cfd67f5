# Character-level Tiny Shakespeare at a size for a laptop's CPU.
#
#   python data/shakespeare_char/prepare.py
#   python train.py config/train_shakespeare_char_cpu.py
#   python sample.py --out_dir=out-shakespeare-char-cpu
#
# Hardware: 2 cores of a 2.8 GHz Xeon. Duration: 2 minutes, half of it evaluation.
# Result: validation loss 1.912 (200 batches), 1.908 (the whole split, --eval_iters=0).

out_dir = "out-shakespeare-char-cpu"
dataset = "shakespeare_char"
wandb_project = "shakespeare-char"
wandb_run_name = "train-shakespeare-char-cpu"
eval_interval = 250
eval_iters = 200
log_interval = 10
gradient_accumulation_steps = 1
batch_size = 12
block_size = 64

n_layer = 4
n_head = 4
n_embd = 128

learning_rate = 1e-3
max_iters = 2000
lr_decay_iters = 2000
min_lr = 1e-4
beta2 = 0.99  # few tokens per step: average over more steps
warmup_iters = 100

device = "cpu"

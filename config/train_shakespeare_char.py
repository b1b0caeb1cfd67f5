# Character-level Tiny Shakespeare with a model that overfits: best.pt has the lowest loss.
#
#   python data/shakespeare_char/prepare.py
#   python train.py config/train_shakespeare_char.py
#
# Hardware: one GPU. Duration: about 3 minutes on an A100; result: best validation loss 1.4697
# (both published for these settings by nanoGPT; not measured here). On a CPU it takes hours:
# see train_shakespeare_char_cpu.py.

out_dir = "out-shakespeare-char"
eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False  # only best.pt is needed
wandb_project = "shakespeare-char"
wandb_run_name = "6x384"

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99  # few tokens per step: average over more steps
warmup_iters = 100

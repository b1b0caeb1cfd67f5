# Your own text in GPT-2's tokens, or a BPE of its own, on a laptop's CPU, by the modern recipe.
#
#   python data/text/prepare.py --input=FOLDER --name=mine --tokenizer=bpe:2000
#   python train.py config/train_text_cpu.py
#   python sample.py --out_dir=out-text-cpu
#
# Hardware: 2 cores of an AMD EPYC without bfloat16 in hardware. Duration: 4 minutes for 400 steps.
# Result: Tiny Shakespeare with bpe:2000: validation loss 4.05, 2.14 bits per byte. By characters,
# train_shakespeare_char_cpu.py --dataset=mine reaches 2.71 on the same split (20 batches).

out_dir = "out-text-cpu"
dataset = "mine"
wandb_project = "text"
wandb_run_name = "text-cpu"
eval_interval = 100
eval_iters = 20
log_interval = 10
sample_every = 100
always_save_checkpoint = False  # best.pt has the lowest validation loss

gradient_accumulation_steps = 1
batch_size = 16
block_size = 128

n_layer = 4
n_head = 4
n_embd = 192
dropout = 0.1  # a short text is read several times

positions = "rotary"
qk_norm = True
smear = True
activation = "relu2"

optimizer = "muon"
muon_momentum = 0.9
learning_rate = 4e-3
schedule = "linear"
cooldown_frac = 0.7
warmup_iters = 0
max_iters = 400
lr_decay_iters = 400
min_lr = 0.0

device = "cpu"

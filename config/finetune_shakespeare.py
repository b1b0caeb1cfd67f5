# Fine-tune the largest GPT-2 on Shakespeare.
#
#   python data/shakespeare/prepare.py
#   python train.py config/finetune_shakespeare.py
#   python sample.py --out_dir=out-shakespeare
#
# Hardware: a GPU with 40 GB or more; a smaller one takes --init_from=gpt2.
# Duration, result: not measured here. 20 steps of 32,768 tokens are 2 epochs.

out_dir = "out-shakespeare"
eval_interval = 5
eval_iters = 40
wandb_project = "shakespeare"
wandb_run_name = "finetune-gpt2-xl"

dataset = "shakespeare"
init_from = "gpt2-xl"
always_save_checkpoint = False  # it overfits soon: only best.pt is needed

batch_size = 1  # so that the largest model fits; 32 micro-batches per step
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5
decay_lr = False

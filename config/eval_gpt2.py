# Loss of OpenAI's gpt2 (124M parameters) on OpenWebText.
#
#   python train.py config/eval_gpt2.py
#
# Hardware: one GPU. Needs: python data/openwebtext/prepare.py. Duration: not measured here.
# Result: train loss 3.11, validation loss 3.12 (published by nanoGPT; not measured here).

init_from = "gpt2"
eval_only = True
eval_iters = 500  # more batches than in training, for a more exact loss
batch_size = 8

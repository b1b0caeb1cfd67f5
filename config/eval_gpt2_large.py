# Loss of OpenAI's gpt2-large (774M parameters) on OpenWebText.
#
#   python train.py config/eval_gpt2_large.py
#
# Hardware: one GPU. Needs: python data/openwebtext/prepare.py. Duration: not measured here.
# Result: train loss 2.66, validation loss 2.67 (published by nanoGPT; not measured here).

init_from = "gpt2-large"
eval_only = True
eval_iters = 500  # more batches than in training, for a more exact loss
batch_size = 8

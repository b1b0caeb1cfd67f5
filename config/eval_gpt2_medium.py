# Loss of OpenAI's gpt2-medium (350M parameters) on OpenWebText.
#
#   python train.py config/eval_gpt2_medium.py
#
# Hardware: one GPU. Needs: python data/openwebtext/prepare.py. Duration: not measured here.
# Result: train loss 2.85, validation loss 2.84 (published by nanoGPT; not measured here).

init_from = "gpt2-medium"
eval_only = True
eval_iters = 500  # more batches than in training, for a more exact loss
batch_size = 8

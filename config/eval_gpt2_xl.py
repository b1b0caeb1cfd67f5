# Loss of OpenAI's gpt2-xl (1558M parameters) on OpenWebText.
#
#   python train.py config/eval_gpt2_xl.py
#
# Hardware: one GPU. Needs: python data/openwebtext/prepare.py. Duration: not measured here.
# Result: train loss 2.56, validation loss 2.54 (published by nanoGPT; not measured here).

init_from = "gpt2-xl"
eval_only = True
eval_iters = 500  # more batches than in training, for a more exact loss
batch_size = 8

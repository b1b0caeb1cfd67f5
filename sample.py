"""Continue a prompt with a trained model.

    python sample.py --out_dir=out-shakespeare-char              # a run of train.py
    python sample.py --init_from=gpt2 --start="Once upon a time" --num_samples=1
    python sample.py --out_dir=out --start=FILE:prompt.txt       # a prompt from a file

Settings are the variables below; config files and --key=value arguments override them.
"""

from configurator import UserError, check, configure, user_errors

init_from = "resume"  # resume (the run in out_dir) | gpt2* | a path | owner/name on the hub
out_dir = "out"
checkpoint: str | None = None  # a file in out_dir; None: best.pt, or else ckpt.pt
start = "\n"  # the prompt, or FILE:path of a UTF-8 text file
num_samples = 10  # drawn as one batch; a single one is printed token by token
max_new_tokens = 500  # per sample
temperature = 0.8  # divides the logits; below 1: less random, 0: greedy
top_k: int | None = 200  # sample from the k most likely tokens; None: from all
top_p: float | None = None  # sample from the most likely tokens with this total probability
repetition_penalty = 1.0  # above 1: lower the logits of tokens that occurred
stop: str | None = None  # end a sample at this token, such as "<|endoftext|>"
seed = 1337
device: str | None = None  # cpu | cuda | cuda:1 | mps; None: choose
dtype: str | None = None  # float32 | bfloat16 | float16; None: choose by hardware and model width
compile: bool | None = False  # torch.compile, which takes about a minute; None: on a GPU

configure(globals())
check(globals(), "num_samples >= 1", "max_new_tokens >= 0", "temperature >= 0",
      "top_k is None or top_k >= 1", "top_p is None or 0 < top_p <= 1",
      "0.01 <= repetition_penalty <= 100", "start != ''", "0 <= seed < 2**64")

from pathlib import Path

import torch

from data.tokenizer import get_tokenizer
from engine import cpu, runtime
from engine.checkpoint import load, load_pretrained, meta_of, path_to_sample
from model import GPT

# ------------------------------------------------------------------------------- model, tokenizer

if runtime.dist_info()[1] > 1:
    raise UserError("sample.py runs in one process: start it without torchrun")
runtime.check_machine(device, dtype, compile)
with user_errors():
    if init_from == "resume":
        path = Path(out_dir) / checkpoint if checkpoint else path_to_sample(out_dir)
        contents = load(path)
        model, meta = GPT.from_checkpoint(contents, {"dropout": 0.0}, path), meta_of(contents)
    else:
        model, meta = load_pretrained(init_from)
rt = runtime.start(device, dtype, compile, model.config.n_embd, flops=0)
# All weights in dtype: decoding is limited by reading them, and autocast would read float32.
model.eval().to(rt.device, getattr(torch, rt.dtype))
if rt.device.type == "cpu":
    cpu.accelerate(model)
if rt.compile:
    model.compile_decode()
tokenizer = get_tokenizer(meta)

# ---------------------------------------------------------------------------------------- prompt

if start.startswith("FILE:"):
    try:
        start = Path(start.removeprefix("FILE:")).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompt {start}: {error}") from None
prompt = tokenizer.encode(start)
stop_ids = tokenizer.encode(stop) if stop else [None]
if len(stop_ids) != 1:
    raise UserError(f"stop = {stop!r} is {len(stop_ids)} tokens: expected one")
idx = torch.tensor([prompt] * num_samples, device=rt.device)  # (B, T)

# -------------------------------------------------------------------------------------- sampling

torch.manual_seed(seed)
options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k,
           "top_p": top_p, "repetition_penalty": repetition_penalty, "stop": stop_ids[0],
           "n_vocab": tokenizer.n_vocab}
with user_errors():
    if num_samples == 1:
        print(start, end="", flush=True)
        for text in tokenizer.decode_stream(step.item() for step in model.stream(idx, **options)):
            print(text, end="", flush=True)
        print()
    else:
        for row in model.generate(idx, **options).tolist():
            if stop_ids[0] in row[len(prompt):]:
                row = row[:row.index(stop_ids[0], len(prompt)) + 1]
            print(tokenizer.decode(row), end="\n---------------\n")

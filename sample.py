"""Continue a prompt with a trained model.

    python sample.py --out_dir=out-shakespeare-char              # what train.py left there
    python sample.py --init_from=gpt2 --start="Once upon a time" --num_samples=1
    python sample.py --out_dir=out --start=FILE:prompt.txt       # a prompt from a file

Settings are the variables below; config files and --key=value arguments override them.
"""

from configurator import UserError, check, configure, user_errors

init_from = "resume"  # resume (the run in out_dir) | gpt2* | a path
out_dir = "out"
checkpoint: str | None = None  # a file in out_dir; None: best.pt, or ckpt.pt where there is none
start = "\n"  # the prompt, or FILE:path of one in UTF-8
num_samples = 10  # drawn together, as one batch; a single one is printed as it comes
max_new_tokens = 500  # in each sample
temperature = 0.8  # below 1: bolder about what is likely; 0: always the likeliest token
top_k: int | None = 200  # draw from the k likeliest tokens; None: from all
top_p: float | None = None  # draw from the fewest tokens that hold this probability; None: all
repetition_penalty = 1.0  # above 1: weaken tokens that have occurred
stop: str | None = None  # end a sample at this token, such as "<|endoftext|>"
seed = 1337
device: str | None = None  # cpu | cuda | cuda:1 | mps; None: choose
dtype: str | None = None  # float32 | bfloat16 | float16; None: choose
compile: bool | None = False  # torch.compile, which takes a minute: not for a CPU; None: on CUDA

configure(globals())
check(globals(), "num_samples >= 1", "max_new_tokens >= 0", "temperature >= 0",
      "top_k is None or top_k >= 1", "top_p is None or 0 < top_p <= 1",
      "0.01 <= repetition_penalty <= 100", "start != ''", "0 <= seed < 2**64")

from pathlib import Path

import torch

import runtime
from checkpoint import build_model, load, load_pretrained, meta_of, path_to_sample
from data.tokenizer import get_tokenizer

# ------------------------------------------------------------------------------- model, tokenizer

runtime.check(device, dtype, compile)
with user_errors():
    if init_from == "resume":
        contents = load(Path(out_dir) / checkpoint if checkpoint else path_to_sample(out_dir))
        model = build_model(contents, dropout=0.0)
        meta = meta_of(contents)
    else:
        model, meta = load_pretrained(init_from)
rt = runtime.start(device, dtype, compile, model.config.n_embd, flops=0)
model.eval().to(rt.device, getattr(torch, rt.dtype))  # all of it: half the memory to read
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

# ------------------------------------------------------------------------------------- sampling

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

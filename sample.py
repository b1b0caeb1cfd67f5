"""Continue a prompt with a trained model.

    python sample.py --out_dir=out-shakespeare-char              # a run of train.py
    python sample.py --init_from=gpt2 --start="Once upon a time" --num_samples=1
    python sample.py --out_dir=out --start=FILE:prompt.txt       # a prompt from a file
    python sample.py --out_dir=out --interactive=True            # one prompt after another
    python sample.py --out_dir=out --export=my-model             # a folder for transformers

Settings are the variables below; config files and --key=value arguments override them. The text
goes to stdout, everything else to stderr.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # for python -I

from configurator import UserError, check, check_choice, configure, regular_file, user_errors

init_from = "resume"  # resume (the run in out_dir) | gpt2* | a path | owner/name on the hub
out_dir = "out"
checkpoint: str | None = None  # a file in out_dir; None: best.pt, or else ckpt.pt
start: str | None = None  # the prompt; FILE:path of a text file; - for stdin; None: a line break
interactive = False  # ask for one prompt after another
export: str | None = None  # write the model to this folder, for transformers, instead of sampling
num_samples = 10  # drawn as one batch; a single one is printed token by token
max_new_tokens = 500  # per sample
temperature = 0.8  # divides the logits; below 1: less random, 0: greedy
top_k: int | None = 200  # sample from the k most likely tokens; None: from all
top_p: float | None = None  # sample from the most likely tokens with this total probability
repetition_penalty = 1.0  # above 1: lower the logits of tokens that occurred
stop: str | None = None  # end a sample after this text, such as "<|endoftext|>"
seed = 1337
device: str | None = None  # cpu | cuda | cuda:1 | mps; None: choose
dtype: str | None = None  # float32 | bfloat16 | float16; None: choose by hardware and model size
compile: bool | None = False  # torch.compile, which takes about a minute; None: on a GPU

configure(globals(), file=sys.stderr)
rules = ["num_samples >= 1", "max_new_tokens >= 0", "temperature >= 0",
         "num_samples * (max_new_tokens + 1) <= 10**8", "init_from != ''",
         "top_k is None or top_k >= 1", "top_p is None or 0 < top_p <= 1",
         "0.01 <= repetition_penalty <= 100", "start != ''", "stop != ''", "export != ''",
         "start is None or not interactive", "0 <= seed < 2**64"]
check(globals(), *rules)
if init_from in ("scratch", "auto"):
    raise UserError(f"init_from = {init_from!r} is for train.py: give resume, gpt2*, a path, or "
                    f"owner/name on the hub")

import time
from contextlib import redirect_stdout, suppress
from pathlib import Path

import torch

from data.tokenizer import get_tokenizer
from engine import cpu, runtime
from engine.checkpoint import load, load_pretrained, meta_of, path_to_sample
from engine.export import export_model
from model import GPT

# ------------------------------------------------------------------------------- model, tokenizer

if runtime.dist_info()[1] > 1:
    raise UserError("sample.py runs in one process: start it without torchrun")
runtime.check_machine(device, dtype, compile)
contents = {}
with user_errors():
    if init_from == "resume":
        path = Path(out_dir) / checkpoint if checkpoint else path_to_sample(out_dir)
        contents = load(path)
        model, meta = GPT.from_checkpoint(contents, {"dropout": 0.0}, path), meta_of(contents)
    else:
        model, meta = load_pretrained(init_from)
    if export:
        export_model(Path(export), model, meta, contents)
        print(f"wrote {export}: AutoModelForCausalLM.from_pretrained({export!r}) reads it",
              file=sys.stderr)
        sys.exit()
runtime.check_memory(model.config, num_samples * min(max_new_tokens, model.config.block_size),
                     device, bytes_per_weight=2)
with redirect_stdout(sys.stderr):
    dtype = dtype or cpu.sampling_dtype(model, runtime.choose_device(device))
    rt = runtime.start(device, dtype, compile, model.config.n_embd, flops=0)
cpu.prepare_sampling(model, rt.device, rt.dtype, rt.compile)
tokenizer = get_tokenizer(meta)
prompt = tokenizer.default_prompt if start is None else start
with user_errors(f"cannot read the prompt {start}: "):
    if start == "-":
        prompt = sys.stdin.read()
    elif prompt.startswith("FILE:"):
        path = Path(os.path.expanduser(prompt.removeprefix("FILE:")))
        prompt = regular_file(path).read_text(encoding="utf-8")

# -------------------------------------------------------------------------------------- sampling


def sample(prompt: str) -> None:
    """Print continuations of a prompt, a single one as it is generated."""
    ids = torch.tensor([tokenizer.encode(prompt)], device=rt.device)  # (1, T)
    idx = ids.repeat(num_samples, 1)  # (B, T)
    rows, n_printed = [[] for _ in idx], 0

    def texts() -> list[str]:
        decoded = [tokenizer.decode(row) for row in rows]
        if stop:  # what follows it is left out
            decoded = ["".join(text.partition(stop)[:2]) for text in decoded]
        return [prompt + text for text in decoded]

    start_time = time.time()
    for step in model.stream(idx, max_new_tokens, temperature, top_k, top_p, repetition_penalty,
                             n_vocab=tokenizer.n_vocab):
        for row, token in zip(rows, step.tolist(), strict=True):
            row.append(token)
        decoded = texts() if num_samples == 1 or stop else []
        if num_samples == 1:
            # The last character may lack bytes: it is printed when it is complete.
            text = decoded[0].rstrip("\ufffd")
            print(text[n_printed:], end="", flush=True)
            n_printed = len(text)
        if stop and all(text.endswith(stop) for text in decoded):
            break
    for text in texts():
        print(text[n_printed:], end="\n" if num_samples == 1 else "\n---------------\n")
    n_tokens = sum(map(len, rows))
    print(f"{n_tokens / (time.time() - start_time):,.0f} tokens per second", file=sys.stderr)


def change_setting(command: str) -> None:
    """Carry out a line such as "/temperature 0.7"."""
    names = ["max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "stop"]
    name, _, value = command[1:].partition(" ")
    if check_choice("command", name, [*names, "help"]) == "help":
        print(*(f"/{name} {globals()[name]}" for name in names), sep="\n")
        return
    changed = dict(globals())
    configure(changed, [f"--{name}={value.strip()}"], file=sys.stderr)
    check(changed, *rules)
    globals()[name] = changed[name]


torch.manual_seed(seed)
if not interactive:
    with user_errors():
        sample(prompt)
    sys.exit()

with suppress(ImportError):  # Windows edits lines without it
    import readline  # noqa: F401
num_samples = 1
print("type a text to continue; /help lists settings, Ctrl-C ends a sample, Ctrl-D the session",
      file=sys.stderr)
while True:
    try:
        line = input("> ")
        change_setting(line) if line.startswith("/") else sample(line or prompt)
    except (UserError, ValueError) as error:
        print(error, file=sys.stderr)
    except KeyboardInterrupt:
        print()
    except EOFError:
        break

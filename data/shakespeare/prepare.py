"""Tiny Shakespeare in GPT-2's BPE: 301,966 training and 36,059 validation tokens.

    python data/shakespeare/prepare.py

Reads input.txt in this folder, which is downloaded if it does not exist, and writes the dataset
here. For a text of your own, see data/text/prepare.py.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from configurator import configure
from data.documents import read_text
from data.encode import write_text_dataset

url = ("https://raw.githubusercontent.com/karpathy/char-rnn/"  # where input.txt comes from
       "master/data/tinyshakespeare/input.txt")
configure(globals())

text = read_text(HERE / "input.txt", url if HERE.name == "shakespeare" else None)
write_text_dataset(HERE, text)

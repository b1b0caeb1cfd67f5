"""Tiny Shakespeare, one token per character: 1,003,854 training and 111,540 validation tokens.

    python data/shakespeare_char/prepare.py

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
from data.tokenizer import CharTokenizer

url = ("https://raw.githubusercontent.com/karpathy/char-rnn/"  # where input.txt comes from
       "master/data/tinyshakespeare/input.txt")
configure(globals())

text = read_text(HERE / "input.txt", url if HERE.name == "shakespeare_char" else None)
write_text_dataset(HERE, text, CharTokenizer.meta_of(text))

"""Python's standard library, one token per character: a dataset that needs no download.

    python data/stdlib_char/prepare.py

Reads the ASCII .py files of the running Python's library, without its tests: about 10 million
characters, 96 distinct; the exact number depends on the version. The files are shuffled by a fixed
seed, so that the last tenth is like the rest. Writes train.bin, val.bin and meta.pkl here.
"""

import random
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from configurator import UserError, configure
from data.encode import write_text_dataset
from data.tokenizer import CharTokenizer

EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test"}

configure(globals())

library = Path(sysconfig.get_paths()["stdlib"])
texts = [path.read_bytes() for path in sorted(library.rglob("*.py"))
         if not EXCLUDED & set(path.relative_to(library).parts)]
texts = [text.decode("ascii") for text in texts if text.isascii()]
if not texts:
    raise UserError(f"no .py files in {library}: this Python stores its library in another form; "
                    f"use a Python that has these files, or prepare another dataset")
random.Random(2357).shuffle(texts)
text = "\n".join(texts)
write_text_dataset(HERE, text, CharTokenizer.meta_of(text))

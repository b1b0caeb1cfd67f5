"""Turn config files and --key=value arguments into checked settings.

A script lists its settings as plain top-level variables, then calls `configure(globals())`:

    python train.py config/train_shakespeare_char.py --batch_size=32 --compile=False

Config files are Python, executed in the order given; arguments override them. Only the standard
library is imported here, so that a mistyped setting is reported before torch is loaded.
"""

import builtins
import difflib
import errno
import os
import re
import sys
import time
import traceback
import typing
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType, NoneType, TracebackType
from typing import TextIO

# For torch, which reads them when it is loaded. Huge pages for large tensors: without them, a CPU
# spends a tenth of a step of GPT-2 124M on page faults. A short spin: the threads of a program that
# wait for work otherwise take the cores from other programs.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

ROOT = Path(__file__).resolve().parent
TYPE_NAMES = {bool: "True or False", int: "a whole number", float: "a finite number", str: "text",
              NoneType: "None"}
LARGEST = {int: 2**64 - 1, float: sys.float_info.max}
WORDS = {"none": None, "true": True, "false": False}
RENAMED = {"decay_fraction": "cooldown_frac"}  # settings of earlier versions
DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
NOT_PATHS = {"start", "stop"}  # texts in which a leading ~ is kept


class UserError(Exception):
    """A user's mistake, in one sentence: what, got, expected, what to do."""


class RunError(Exception):
    """A failure during a run that could not be foreseen at its start, in one sentence."""


def configure(settings: dict, argv: list[str] | None = None, also_accept: Path | None = None,
              file: TextIO | None = None) -> tuple[dict, dict]:
    """Override a script's settings from config files and --key=value arguments.

    settings: the script's `globals()`, changed in place. Its public lower-case variables that
        hold a bool, int, float, str or None are the settings; an annotation such as `int | None`
        gives the types that one accepts, otherwise it is the type of the default.
    argv: arguments without the program's name; None: `sys.argv[1:]`.
    also_accept: a script whose settings config files may contain too; they are ignored.
    file: where the settings that differ from the defaults are printed; None: stdout.
    Returns (config, overrides): all settings, and those that files or arguments gave.
    Raises UserError. From here on, an uncaught UserError, or OSError that names a file, ends the
    process with one line on stderr and exit status 2, a RunError with one line and status 1.
    """
    sys.excepthook = _report_and_exit
    if settings.get("__name__", "__main__") != "__main__":
        raise UserError(f"{settings['__file__']} is a script: it is run, not imported")
    _replace_closed_streams()
    with suppress(AttributeError):  # where stdout is not a stream of bytes
        sys.stdout.reconfigure(errors="backslashreplace")  # an ASCII terminal shows \\xe9 for é
    types = _types(settings)
    defaults = {name: settings[name] for name in types}
    overrides = {}
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(settings["__doc__"] or "", "Settings:", sep="\n")
        for name, comment in _assignments(settings["__file__"]).items():
            if name in types:
                print(f"  {f'--{name}={settings[name]!r}':<40} {comment}".rstrip())
        raise SystemExit(0)
    ignored = _assignments(also_accept) if also_accept else {}
    for arg in sorted(argv, key=lambda arg: arg.startswith("--")):  # config files first
        if arg.startswith("--"):
            name, equals, text = arg[2:].partition("=")
            if name in types and not equals:
                raise UserError(f"--{name} has no value: write --{name}={defaults[name]}")
            overrides |= fit_types(settings, {name: _parse(text, types.get(name, ()))})
        else:
            found = _run_config(arg, defaults | overrides, ignored)
            overrides |= fit_types(settings, found, arg)
    for name, value in overrides.items():
        if isinstance(value, str) and name not in NOT_PATHS:
            overrides[name] = os.path.expanduser(value)  # the shell leaves --name=~/folder
    settings.update(overrides)
    changed = [f"{k}={v!r}" for k, v in overrides.items() if v != defaults[k]]
    if changed:
        print0("settings:", *changed, file=file)
    return defaults | overrides, overrides


def print0(*values: object, file: TextIO | None = None) -> None:
    """Print in the main process only, to a file; None: stdout."""
    if os.environ.get("RANK", "0") == "0":
        try:
            print(*values, flush=True, file=file)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            _discard_output()  # the terminal is gone, as after a dropped ssh; SIGHUP follows


def _discard_output() -> None:
    """Send what stdout still holds, and all to come, to the null device."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _replace_closed_streams() -> None:
    """Open the null device for standard streams that are closed, as after `2>&-`: else another file
    gets their number, and the errors that C code prints."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            null = open(os.devnull, "r+", errors="backslashreplace")  # noqa: SIM115
            os.dup2(null.fileno(), number)
            setattr(sys, name, null)


def regular_file(path: Path) -> Path:
    """The path. Raises OSError if a folder is there, or a pipe or device, which may have no end."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file, but a folder, pipe or device", str(path))
    return path


def check(settings: dict, *rules: str) -> None:
    """Raise UserError unless every rule, a Python condition over the settings, holds.

    Example: `check(globals(), "0 <= dropout < 1", "top_k is None or top_k > 0")`.
    """
    for rule in rules:
        code = compile(rule, "rule", "eval")  # rules are written in scripts, never by users
        if not eval(code, {}, settings):
            names = sorted(name for name in code.co_names if name in settings)
            found = ", ".join(f"{name} = {settings[name]!r}" for name in names)
            raise UserError(f"{found}: expected {rule}")


def check_choice(name: str, value: str, choices: list[str]) -> str:
    """Return `value` if it is one of `choices`; else raise UserError that lists them."""
    if value not in choices:
        raise UserError(f"{name} = {value!r}: expected one of {', '.join(choices)}"
                        f"{nearest(value, choices)}")
    return value


@contextmanager
def user_errors(source: str = "") -> Iterator[None]:
    """Turn ValueErrors, such as those of model.py about settings, into UserErrors."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{source}{error}") from None


def fit_types(settings: dict, values: dict, source: object = "") -> dict:
    """Values from arguments or a file, as the types of a script's settings of the same names.

    settings: the script's `globals()`. Raises UserError naming the source and what does not fit.
    """
    types, prefix = _types(settings), f"{source}: " if source else ""
    for name in values:
        if name in RENAMED:
            raise UserError(f"{prefix}setting {name!r} is now {RENAMED[name]}")
        if name not in types:
            raise UserError(f"{prefix}setting {name!r:.100} does not exist"
                            f"{nearest(name.replace('-', '_'), list(types))}; "
                            f"--help lists the settings")
    return {name: _convert(prefix + name, value, types[name]) for name, value in values.items()}


def _types(settings: dict) -> dict[str, tuple[type, ...]]:
    """The types that each setting accepts, by name."""
    annotations = settings.get("__annotations__", {})
    types = {}
    for name, value in settings.items():
        if isinstance(value, tuple(TYPE_NAMES)) and not (name.startswith("_") or name.isupper()):
            annotation = annotations.get(name, type(value))
            types[name] = typing.get_args(annotation) or (annotation,)
    return types


def _run_config(arg: str, current: dict, ignored: dict) -> dict:
    """Execute one config file; return the settings that it assigns."""
    path = next((p for p in (Path(arg), ROOT / arg) if os.path.exists(p)), None)
    if path is None:
        names = [path.stem for path in sorted((ROOT / "config").glob("*.py"))]
        raise UserError(f"no config file {arg!r}{nearest(Path(arg).stem, names)}: arguments are "
                        f"config files and --key=value")
    # Current settings are visible as builtins, so that the namespace holds only assignments.
    namespace = {"__builtins__": vars(builtins) | current, "__file__": str(path)}
    source = regular_file(path).read_bytes()
    try:
        exec(compile(source, str(path), "exec"), namespace)
    except BaseException as error:  # GeneratorExit and SystemExit, too
        message = " ".join("".join(traceback.format_exception_only(error)).split())
        raise UserError(f"config file {path} failed with {message:.500}") from None
    return {name: value for name, value in namespace.items() if name in current or not (
        name.startswith("_") or name in ignored or callable(value)
        or isinstance(value, ModuleType))}


def nearest(word: str, choices: list[str]) -> str:
    """A question that names the choice most like a mistyped word; empty if none is like it."""
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def _parse(text: str, types: tuple[type, ...]) -> object:
    """The value that --name=text stands for, for a setting of these types."""
    if str in types:
        return None if text == "None" and NoneType in types else text
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    for number in (int, float):
        with suppress(ValueError):
            return number(text)
    return text


def _convert(name: str, value: object, types: tuple[type, ...]) -> object:
    """A value as one of a setting's types: int becomes float, 0 and 1 bool, 6e5 int; a number of
    numpy becomes one of Python."""
    given = value
    if type(value).__module__ == "numpy" and not getattr(value, "ndim", 0):
        value = value.item()
    if type(value) is int and float in types and abs(value) <= LARGEST[float]:
        value = float(value)
    elif type(value) is int and bool in types and value in (0, 1):
        value = bool(value)
    elif type(value) is float and int in types and value.is_integer():
        value = int(value)
    kind = type(value)
    if kind in types and (abs(value) <= LARGEST[kind] if kind in LARGEST else  # no nan
                          kind is not str or ("\0" not in value
                                              and value == value.encode(errors="ignore").decode())):
        return value
    try:
        found = " ".join(f"{given!r:.200}".split())
    except ValueError:  # Python refuses to print an int of thousands of digits
        found = "a number of very many digits"
    expected = " or ".join(TYPE_NAMES[t] for t in types)
    if kind in types:
        expected += {int: " of at most 64 bits", str: " in UTF-8, without NUL"}.get(kind, "")
    raise UserError(f"{name} = {found} is {type(given).__name__}: expected {expected}")


def _assignments(path: str | Path) -> dict[str, str]:
    """The names that a script assigns before it calls `configure`, each with its comment."""
    source = Path(path).read_text(encoding="utf-8").partition("configure(globals()")[0]
    return dict(re.findall(r"^(\w+)(?:: [^=\n]+)? = .*?(?: (#.*))?$", source, re.MULTILINE))


def _report_and_exit(kind: type, error: BaseException, trace: TracebackType) -> None:
    """sys.excepthook: one line for errors that are not bugs."""
    message, status = str(error), 2
    if issubclass(kind, ModuleNotFoundError):
        message = f"this needs the package {error.name}: pip install -r requirements.txt"
    elif issubclass(kind, KeyboardInterrupt):
        message, status = "stopped by Ctrl-C", 130
    elif issubclass(kind, BrokenPipeError):  # the reader, such as head, has closed the pipe
        message, status = "", 1
    elif issubclass(kind, OSError) and (error.filename or error.errno in DISK_FULL):
        message = (f"cannot read or write {error.filename or 'the output'!s:.300}: "
                   f"{error.strerror}; check the path, its permissions and the disk")
    elif issubclass(kind, MemoryError) or (issubclass(kind, RuntimeError)
                                           and "allocate" in message):  # torch's, any device
        message = (f"out of memory ({' '.join(message.split())[:200] or kind.__name__}): choose "
                   f"smaller sizes, such as batch_size, block_size, n_embd or num_samples")
    elif issubclass(kind, RunError):
        status = 1
    elif not issubclass(kind, UserError):  # a bug: keep its traceback
        sys.__excepthook__(kind, error, trace)
        return
    try:
        sys.stdout.flush()
    except OSError:  # discard the output, so that Python's own flush at the end cannot fail
        _discard_output()
    if message and os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(5)  # if rank 0 has the same error, torchrun ends this process meanwhile
    if message:
        with suppress(OSError):  # stderr is full or gone
            print("error:", *message.split(), file=sys.stderr)  # in one line
    raise SystemExit(status)

"""Config files, arguments and their errors, in this process and in scripts as users run them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run

from configurator import RENAMED, UserError, check, check_choice, configure

SCRIPT = '''"""A script with one setting of each kind."""

count = 3  # how many
rate = 0.5  # how fast
name = "x"  # any text, # included
flag = False  # on or off
maybe: bool | None = None  # on, off, or chosen
top_k: int | None = 7
ratio: float | None = None
label: str | None = None  # text or nothing
_private = 1
CONSTANT = 1
listed = [1, 2]
'''
DEFAULTS = {"count": 3, "rate": 0.5, "name": "x", "flag": False, "maybe": None, "top_k": 7,
            "ratio": None, "label": None}
SCRIPTS = ["train.py", "sample.py", "bench.py",
           *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("data/*/prepare.py"))]

NANOGPT_CONFIG = '''
import time
wandb_log = False # feel free to turn on
wandb_run_name = 'ft-' + str(time.time())
init_from = 'gpt2-xl' # this is the largest GPT-2 model
always_save_checkpoint = False

# 1 batch_size * 32 grad_accum * 1024 tokens = 32,768 tokens/iter
gradient_accumulation_steps = 8 * 4
max_iters = 6e5
dropout = 0
device = 'cpu'
compile = False # do not torch compile the model
'''

RELIED_ON = {
    "train.py": "out_dir eval_interval log_interval eval_iters eval_only always_save_checkpoint "
                "init_from wandb_log wandb_project wandb_run_name dataset batch_size block_size "
                "gradient_accumulation_steps n_layer n_head n_embd dropout bias learning_rate "
                "max_iters weight_decay beta1 beta2 grad_clip decay_lr warmup_iters "
                "lr_decay_iters min_lr backend device dtype compile",
    "sample.py": "init_from out_dir start num_samples max_new_tokens temperature top_k seed device "
                 "dtype compile",
    "bench.py": "batch_size block_size bias real_data seed device dtype compile profile",
}


@pytest.fixture(autouse=True)
def restore_excepthook(monkeypatch):
    """`configure` sets sys.excepthook."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """The path of SCRIPT as a file."""
    path = tmp_path_factory.mktemp("script") / "script.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture
def new(script):
    """Globals of SCRIPT, as they stand when it calls `configure(globals())`."""
    namespace = {"__file__": str(script), "__name__": "__main__", "__annotations__": {}}
    exec(SCRIPT, namespace)
    return namespace


@pytest.fixture
def write(tmp_path):
    """Write a config file and return its path as an argument."""
    def write(text: str, name: str = "config.py") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)
    return write


def error_of(namespace: dict, *argv: str) -> str:
    """The error that arguments end in; no setting has changed by then."""
    before = dict(namespace)
    with pytest.raises(UserError) as caught:
        configure(namespace, list(argv))
    assert namespace == before
    return str(caught.value)


# ------------------------------------------------------------------------------ which value counts

def test_config_files_may_contain_the_settings_of_another_script(new, write, tmp_path):
    other = tmp_path / "other.py"
    other.write_text("import os\nlearning_rate = 1e-3  # of theirs\nwidth: int | None = None\n"
                     "config, _ = configure(globals())\nlater = 1\n")
    file = write("count = 4\nlearning_rate = 3\nwidth = 5")
    config, overrides = configure(new, [file], also_accept=other)
    assert overrides == {"count": 4} and "learning_rate" not in config
    for name in ("learning_rat", "later"):  # neither a setting of ours nor of theirs
        with pytest.raises(UserError, match=f"'{name}' does not exist"):
            configure(new, [write(f"{name} = 3", "typo.py")], also_accept=other)
    for argument, also_accept in ((file, None), ("--learning_rate=3", other)):
        with pytest.raises(UserError, match="'learning_rate' does not exist"):
            configure(new, [argument], also_accept=also_accept)


@pytest.mark.parametrize("environment, expected", [
    ({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")])
def test_waiting_threads_sleep_soon_unless_the_environment_says_otherwise(environment, expected):
    code = "import configurator, os; print(os.environ.get('GOMP_SPINCOUNT'))"
    inherited = {name: value for name, value in os.environ.items()
                 if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=inherited | environment,
                             capture_output=True, text=True, check=True).stdout
    assert printed.strip() == expected


def test_without_arguments_settings_keep_their_defaults(new, capsys):
    config, overrides = configure(new, [])
    assert config == DEFAULTS
    assert (overrides, capsys.readouterr().out) == ({}, "")


def test_the_later_of_two_values_counts_and_an_argument_before_a_file(new, write):
    a, b = write("count = 4", "a.py"), write("count = 9", "b.py")
    for argv, count in (([a, b], 9), (["--count=5", "--count=6"], 6), (["--count=5", a], 5)):
        configure(new, argv)
        assert new["count"] == count


def test_a_config_file_sees_the_defaults_and_the_settings_of_earlier_files(new, write):
    configure(new, [write("count = 10 * count\nrate += 1", "a.py"), write("count += 2", "b.py")])
    assert (new["count"], new["rate"]) == (32, 1.5)


def test_settings_that_differ_from_the_defaults_are_printed_and_all_given_are_overrides(
        new, write, capsys):
    config, overrides = configure(new, [write("flag = True\ncount = 3"), "--name=a b"])
    assert overrides == {"flag": True, "count": 3, "name": "a b"}
    assert config == DEFAULTS | overrides == {name: new[name] for name in DEFAULTS}
    assert capsys.readouterr().out == "settings: flag=True name='a b'\n"


def test_only_the_first_of_many_processes_prints_the_settings(new, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    configure(new, ["--count=4"])
    assert capsys.readouterr().out == ""


def test_config_files_may_import_modules_and_define_functions(new, write):
    configure(new, [write("import math, time\ndef f(x):\n    return x + count\n"
                          "class Kept: pass\n_scratch = [1]\ncount = f(math.floor(2.5))")])
    assert new["count"] == 5


# ------------------------------------------------------------------------------------------ types

@pytest.mark.parametrize(("name", "text", "value"), [
    ("count", "-12", -12), ("count", "6e5", 600000), ("rate", "2", 2.0), ("rate", "1e-4", 1e-4),
    ("name", "a=b", "a=b"), ("name", "", ""), ("name", "True", "True"), ("name", "None", "None"),
    ("name", "\n é 日", "\n é 日"), ("label", "7", "7"), ("label", "None", None),
    ("label", "none", "none"), ("flag", "true", True), ("flag", "1", True), ("maybe", "0", False),
    ("maybe", "None", None), ("top_k", "None", None), ("top_k", "12", 12), ("ratio", "3", 3.0)])
def test_arguments_become_values_of_the_settings_type(new, name, text, value):
    configure(new, [f"--{name}={text}"])
    assert (new[name], type(new[name])) == (value, type(value))


def test_values_of_a_config_file_become_the_settings_type(new, write):
    configure(new, [write("count = 6e5; rate = ratio = 2; name = ''; flag = 1; maybe = 0; "
                          "top_k = 2.0; label = None")])
    expected = {"count": 600000, "rate": 2.0, "name": "", "flag": True, "maybe": False, "top_k": 2,
                "ratio": 2.0, "label": None}
    assert repr({name: new[name] for name in DEFAULTS}) == repr(expected)  # as 2 == 2.0


@pytest.mark.parametrize(("name", "text", "got", "expected"), [
    ("count", "2.5", "2.5 is float", "a whole number"),
    ("count", "True", "True is bool", "a whole number"),
    ("rate", "nan", "nan is float", "a finite number"),
    ("rate", "1e999", "inf is float", "a finite number"),
    ("rate", 400 * "9", f"{400 * '9':.200} is int", "a finite number"),
    ("flag", "2", "2 is int", "True or False"),
    ("flag", "None", "None is NoneType", "True or False"),
    ("maybe", "1.5", "1.5 is float", "True or False or None"),
    ("top_k", "x", "'x' is str", "a whole number or None")])
def test_an_argument_of_a_wrong_type_says_what_was_expected_and_got(
        new, name, text, got, expected):
    assert error_of(new, f"--{name}={text}") == f"{name} = {got}: expected {expected}"


@pytest.mark.parametrize(("text", "got", "expected"), [
    ("count = '4'", "'4' is str", "a whole number"),
    ("count = 10**5000", "a number of very many digits is int",
     "a whole number of at most 64 bits"),
    ("name = 'caf\\udce9'", "'caf\\udce9' is str", "text in UTF-8, without NUL"),
    ("rate = float", "<class 'float'> is type", "a finite number"),
    ("label = 5", "5 is int", "text or None")])
def test_a_config_value_of_a_wrong_type_says_in_which_file_and_what_was_expected_and_got(
        new, write, text, got, expected):
    path, name = write(text), text.split()[0]
    assert error_of(new, path) == f"{path}: {name} = {got}: expected {expected}"


# ---------------------------------------------------------------------------------- wrong settings

@pytest.mark.parametrize(("argument", "message"), [
    ("--Count=4", "setting 'Count' does not exist (did you mean count?)"),
    ("--_private=4", "setting '_private' does not exist"),
    ("--CONSTANT=4", "setting 'CONSTANT' does not exist"),
    ("--listed=4", "setting 'listed' does not exist"),
    ("--top-k=4", "setting 'top-k' does not exist (did you mean top_k?)"),
    ("--decay_fraction=1", f"setting 'decay_fraction' is now {RENAMED['decay_fraction']}"),
    ("--count", "--count has no value: write --count=3"),
    ("-count=4", "no config file '-count=4': arguments are config files and --key=value")])
def test_an_argument_that_names_nothing_is_answered_with_what_may_be(new, argument, message):
    assert error_of(new, argument).startswith(message)


@pytest.mark.parametrize(("text", "kind"), [
    ("count = = 4", "File "), ("count = batch", "NameError"), ("count = 4\0", ""),
    ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    ("raise GeneratorExit", "GeneratorExit"),
    ("class Odd(Exception):\n    def __str__(self): raise self\nraise Odd", "Odd: <exception str"),
    ("import sys, train", "configurator.UserError: "),
    ("assert False, 'two\\nlines'", "AssertionError: two lines")])
def test_a_config_file_that_fails_is_named_with_its_error_in_one_line(new, write, text, kind):
    path = write(text)
    message = error_of(new, path)
    assert message.startswith(f"config file {path} failed with {kind}")
    assert "\n" not in message


def test_check_names_the_values_and_the_rule_that_fails():
    values = {"warmup": 9, "decay": 5, "rate": 1.0, "top_k": None}
    check(values, "rate > 0", "top_k is None or top_k > 0")
    with pytest.raises(UserError) as caught:
        check(values, "rate > 0", "max(warmup, 1) < decay")
    assert str(caught.value) == "decay = 5, warmup = 9: expected max(warmup, 1) < decay"


def test_check_choice_lists_the_choices_with_the_nearest():
    assert check_choice("activation", "relu", ["gelu", "relu"]) == "relu"
    with pytest.raises(UserError) as caught:
        check_choice("activation", "rellu", ["gelu", "relu", "silu"])
    assert str(caught.value) == ("activation = 'rellu': expected one of gelu, relu, silu "
                                 "(did you mean relu?)")


# ------------------------------------------------------------------------------------------- help

@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--count=4", "--help"], ["--oops", "-h"]])
def test_help_prints_the_docstring_and_each_setting_with_default_and_comment(new, argv, capsys):
    with pytest.raises(SystemExit) as stop:
        configure(new, argv)
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "A script with one setting of each kind."
    found = [line.split(maxsplit=1) for line in lines if line.startswith("  --")]
    assert found == [
        ["--count=3", "# how many"], ["--rate=0.5", "# how fast"],
        ["--name='x'", "# any text, # included"], ["--flag=False", "# on or off"],
        ["--maybe=None", "# on, off, or chosen"], ["--top_k=7"], ["--ratio=None"],
        ["--label=None", "# text or nothing"]]


@pytest.mark.parametrize("path", SCRIPTS)
def test_help_of_every_script_prints_its_settings_with_their_comments(path):
    done = run("-I", ROOT / path, "--help")  # isolated: without the current folder in sys.path
    assert (done.returncode, done.stderr) == (0, "")
    shown = dict(re.findall(r"^  --(\w+)=(.*)$", done.stdout, re.M))
    assert shown.keys() >= set(RELIED_ON.get(path, "").split())
    source, _, _ = (ROOT / path).read_text(encoding="utf-8").partition("configure(globals()")
    commented = re.findall(r"^([a-z]\w*)\b.* = .*  # (.*)$", source, re.M)
    assert [name for name, comment in commented if not shown[name].endswith(comment)] == []


# ---------------------------------------------------------------------------- scripts as users run

@pytest.fixture(scope="module")
def nothing_heavy(tmp_path_factory):
    """A folder of modules that fail when they are imported, to go first on PYTHONPATH."""
    folder = tmp_path_factory.mktemp("modules")
    for name in ("torch", "tiktoken", "datasets", "pyarrow", "transformers", "wandb", "requests"):
        (folder / f"{name}.py").write_text("raise RuntimeError(f'{__name__} is heavy')\n")
    return folder


@pytest.mark.parametrize("path, argument", [
    *((path, "--nope=1") for path in SCRIPTS), ("train.py", "config/nope.py"),
    ("train.py", "--dropout=1"), ("sample.py", "--top_k=0"), ("bench.py", "--rounds=0")])
def test_a_mistake_is_one_line_and_status_2_before_anything_heavy_is_imported(
        path, argument, nothing_heavy):
    done = run(ROOT / path, argument, PYTHONPATH=str(nothing_heavy))
    assert done.returncode == 2
    name = argument.removeprefix("--").partition("=")[0]
    assert re.fullmatch(rf"(settings: .*\n)?error: [^\n]*{name}[^\n]*\n", done.stderr)


# Here --log_interval=0, refused when all has been read, ends train.py before it trains.

def test_a_config_file_of_nanogpt_is_accepted_unchanged(write):
    done = run(ROOT / "train.py", write(NANOGPT_CONFIG), "--log_interval=0")
    assert done.stderr == "error: log_interval = 0: expected log_interval >= 1\n"
    for changed in ("init_from='gpt2-xl'", "always_save_checkpoint=False", "compile=False",
                    "gradient_accumulation_steps=32", "device='cpu'", "wandb_run_name='ft-1"):
        assert changed in done.stdout
    assert "max_iters" not in done.stdout  # 6e5 is the default


def test_a_config_is_found_in_the_current_folder_or_else_in_the_repository(tmp_path):
    args = [ROOT / "train.py", "config/finetune_shakespeare.py", "--log_interval=0"]
    assert "dataset='shakespeare'" in run(*args, cwd=tmp_path).stdout
    (tmp_path / "config").mkdir()
    (tmp_path / "config/finetune_shakespeare.py").write_text("dataset = 'mine'\n")
    assert "settings: dataset='mine' log_interval=0\n" in run(*args, cwd=tmp_path).stdout


# ------------------------------------------------------------------------------ how a script ends

def write_script(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "script.py"
    path.write_text("\n".join(["import sys", f"sys.path.insert(0, {str(ROOT)!r})",
                               "from configurator import configure", "configure(globals())",
                               *lines]))
    return path


def test_characters_that_the_terminal_lacks_are_escaped(tmp_path):
    script = write_script(tmp_path, "print(name)")
    script.write_text("name = 'x'\n" + script.read_text())
    done = run(script, "--name=caf\xe9", PYTHONIOENCODING="ascii", PYTHONUTF8="1")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "settings: name='caf\\xe9'\ncaf\\xe9\n"


@pytest.mark.parametrize("line, status, words", [
    ("import no_such", 2, "this needs the package no_such: pip install -r requirements.txt\n"),
    ("import configurator; raise configurator.RunError('gone')", 1, "gone\n"),
    ("raise KeyboardInterrupt", 130, "stopped by Ctrl-C\n"),
    ("open('none/a.bin')", 2,
     "cannot read or write none/a.bin: No such file or directory; check the path, its permissions"),
    ("bytearray(10**18)", 2, "out of memory (MemoryError): choose smaller sizes, such as batch_s"),
    ("raise RuntimeError('CUDA out of memory. Tried to allocate 2 GiB.\\nSee')", 2,
     "out of memory (CUDA out of memory. Tried to allocate 2 GiB. See): choose smaller")])
def test_what_is_no_bug_ends_in_one_line_and_an_exit_status(tmp_path, line, status, words):
    done = run(write_script(tmp_path, line))
    assert done.returncode == status
    assert done.stderr.startswith(f"error: {words}")
    assert done.stderr.count("\n") == 1


def test_a_bug_ends_in_a_traceback(tmp_path):
    done = run(write_script(tmp_path, "1 / 0"))
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback") and "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize("closed", ["0", "1", "2", "0 1 2"])
def test_the_numbers_of_closed_streams_are_not_given_to_other_files(tmp_path, closed):
    path = write_script(tmp_path, "print('out')", "with open('log', 'w') as file:",
                        "    assert file.fileno() > 2", "    file.write('whole')",
                        "raise KeyboardInterrupt")
    redirections = " ".join(f"{number}>&-" for number in closed.split())
    done = subprocess.run(f"{sys.executable} {path} {redirections}", shell=True, cwd=tmp_path,
                          text=True, capture_output=True)
    assert done.returncode == 130
    assert (tmp_path / "log").read_text() == "whole"
    assert done.stdout == ("" if "1" in closed else "out\n")
    assert done.stderr == ("" if "2" in closed else "error: stopped by Ctrl-C\n")


def test_in_all_texts_but_prompts_a_leading_tilde_is_the_home_folder(new, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    new |= {"start": "x", "maybe": None}
    config, _ = configure(new, ["--name=~/data", "--label=a~", "--start=~/data"])
    assert (config["name"], config["label"], config["start"]) == ("/home/me/data", "a~", "~/data")


def test_numbers_of_numpy_become_numbers_of_python(new, write):
    config, _ = configure(new, [write(
        "import numpy as np\ncount = np.int64(4)\nrate = np.float32(0.25)\nratio = np.uint8(2)\n"
        "top_k = np.float64(8)")])
    values = [config[name] for name in ("count", "rate", "ratio", "top_k")]
    assert [(type(value), value) for value in values] == [
        (int, 4), (float, 0.25), (float, 2.0), (int, 8)]


def test_a_closed_pipe_is_no_error(tmp_path):
    path = write_script(tmp_path, "for i in range(100000): print(i, flush=True)")
    done = subprocess.run(f"env -u PYTHONUNBUFFERED {sys.executable} {path} | head -1", shell=True,
                          text=True, capture_output=True)
    assert (done.stdout, done.stderr) == ("0\n", "")

"""A short form of tests/fuzz.py: wrong uses made at random are refused, and touch no file."""

import random
from collections.abc import Iterable
from pathlib import Path

import pytest
from fuzz import Case, fault, make_case, run_case, setting_case, settings_of
from wrong_use import CAN_DROP, write_template


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    return write_template(tmp_path_factory.mktemp("cases") / "template")


def check(cases: Iterable[Case], template: Path) -> None:
    """Raise AssertionError that lists what is wrong with how cases end."""
    found = []
    for case in cases:
        if CAN_DROP or not case.unprivileged:
            what, done = run_case(case, template, template.with_name("case"))
            if what:
                found.append(f"{case.what}: {what}: {done.stderr[-300:]}")
    assert not found, "\n".join(found)


def test_a_wrong_value_of_each_setting_is_refused(template):
    rng = random.Random(0)
    cases = []
    for command in ["train", "sample", "bench", "characters", "documents", "text"]:
        for name in settings_of(command):
            candidates = [setting_case(command, name, rng) for _ in range(40)]
            cases.append(max(candidates, key=lambda case: (
                case.harmful, case.what.endswith("= -1"))))  # of a type that is right
    check(cases, template)


def test_wrong_settings_files_and_values_in_files_are_refused(template):
    check((make_case(1, number, template) for number in range(40)), template)


def test_a_case_that_ends_otherwise_is_reported():
    case = Case("", [], ["seed"], harmful=True)
    assert fault(case, 2, "error: seed = -1: expected seed >= 0\n", set()) is None
    for status, error in [(0, ""), (-14, ""), (1, "error: seed\n"), (3, "error: seed\n"),
                          (2, "seed\n"), (2, "error: seed\nmore\n"), (2, "error: it\n"),
                          (2, "Traceback\nerror: seed\n")]:
        assert fault(case, status, error, set()), (status, error)
    assert fault(case, 2, "error: seed = -1\n", {Path("out/ckpt.pt")})

from __future__ import annotations

import subprocess

import pytest

from fedlora_app.foundation.terminal import shell


@pytest.mark.parametrize("text", ["run", "a b", "it's", "config='x y'", "a'b$c", "`a`", "#", ""])
def test_a_shown_argument_is_the_same_to_a_shell(text):
    done = subprocess.run(["sh", "-c", f"printf %s {shell(text)}"], capture_output=True, text=True)
    assert done.stdout == text


def test_plain_ones_are_shown_as_they_are():
    assert shell("results/run_1.2@3") == "results/run_1.2@3"
    assert shell("config='conf/demo.yaml'") == "\"config='conf/demo.yaml'\""

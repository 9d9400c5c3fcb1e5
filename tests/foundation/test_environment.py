from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from fedlora_app.foundation.environment import ALLOCATOR, ALLOCATOR_BEFORE, prepare_environment


def prepared(**given: str) -> dict[str, str]:
    prepare_environment(given)
    return given


def test_what_the_user_has_set_stays():
    assert prepared()[ALLOCATOR] == "expandable_segments:True"
    assert prepared()["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] == "0"
    assert prepared(**{ALLOCATOR: ""})[ALLOCATOR] == ""
    assert ALLOCATOR not in prepared(**{ALLOCATOR_BEFORE: "max_split_size_mb:64"})


@pytest.mark.parametrize("release", ["5.15.167.4-microsoft-standard-WSL2", "4.4.0-Microsoft"])
def test_growing_segments_are_left_out_under_wsl(monkeypatch, release):
    monkeypatch.setattr(platform, "release", lambda: release)
    assert ALLOCATOR not in prepared()


def test_it_comes_before_torch():
    code = (
        "import sys; from fedlora_app.foundation import environment;"
        "assert not {'torch', 'ray', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

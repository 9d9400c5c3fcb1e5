from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fedlora_app.foundation import cores
from fedlora_app.foundation.cores import count_cores

ALL = len(os.sched_getaffinity(0))


@pytest.fixture(autouse=True)
def no_limits(monkeypatch, tmp_path):
    for name in ("QUOTA_FILE", "ENVIRONMENT_FILE"):
        monkeypatch.setattr(cores, name, tmp_path / name)


@pytest.mark.parametrize("quota", ["max 100000", "", "nonsense", "0 0"])
def test_without_a_limit_it_is_what_the_process_may_run_on(quota):
    assert count_cores() == ALL
    cores.QUOTA_FILE.write_text(quota)
    assert count_cores() == ALL


@pytest.mark.parametrize(("quota", "expected"), [("150000 100000", 2), ("50000 100000", 1)])
def test_a_containers_quota_counts(monkeypatch, quota, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    cores.QUOTA_FILE.write_text(f"{quota}\n")
    assert count_cores() == expected


@pytest.mark.parametrize(
    ("given", "expected"), [("3", 3), ("4,2", 4), ("64", 8), ("0", 8), ("-1", 8), ("many", 8)]
)
def test_the_users_omp_num_threads_counts(monkeypatch, given, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    cores.ENVIRONMENT_FILE.write_bytes(f"A=1\0OMP_NUM_THREADS={given}\0B=2\0".encode())
    assert count_cores() == expected


def test_what_ray_sets_later_does_not():
    script = (
        "import os, pathlib; os.sched_getaffinity = lambda pid: range(8)\n"
        "from fedlora_app.foundation import cores\n"
        "cores.QUOTA_FILE = pathlib.Path('/none')\n"
        "os.environ['OMP_NUM_THREADS'] = '1'\n"
        "print(cores.count_cores())"
    )
    for given, expected in ((None, "8"), ("5", "5")):
        env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        env |= {} if given is None else {"OMP_NUM_THREADS": given}
        result = subprocess.run(
            [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True
        )
        assert result.stdout.strip() == expected

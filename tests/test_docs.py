"""README and docs name nothing that does not exist, and their example runs."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT
from typer.main import get_command

from fedlora_app.cli import app

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FILE = r"(?:fedlora_app|tests|conf|docs|data|benchmarks|notebooks)/[\w./-]*\w"
WRITTEN_LATER = {
    *("data/local_train.json", "data/local_test.json"),  # in a client's own folder
    *("data/universal_train.json", "data/universal_test.json", "data/conflict_test.json"),
    "data/faq",
    "data/faq/experiment.yaml",
    "data/desk",
    "data/planted",
    "data/planted/experiment.yaml",
    "data/alpaca",
    "data/entangled",
    "data/states-de",
    "fedlora_app/federation/rules/norm_clipped.py",
}


@pytest.fixture(params=PAGES, ids=lambda path: path.name)
def page(request):
    return request.param


def test_relative_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = [t for t in re.findall(r"\]\(([^)#]+)\)", text) if not t.startswith("http")]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_files_that_are_named_exist(page):
    named = set(re.findall(rf"(?<![\w/.-]){FILE}", page.read_text(encoding="utf-8")))
    named = {name for name in named if not name.startswith("data/ann")}  # in quoted errors
    assert {n for n in named - WRITTEN_LATER if not (ROOT / n).exists()} == set()


def test_commands_and_options_exist(page):
    known = get_command(app).commands
    for name, rest in re.findall(r"^\$? ?fedlora ([\w-]+)([^\n#]*)", page.read_text(), re.M):
        command = known[name]
        if below := getattr(command, "commands", None):  # as of fedlora deploy
            command = below[rest.split()[0]]
        options = {option for p in command.params for option in p.opts}
        assert set(re.findall(r"(?<=\s)--[\w-]+", rest)) <= options, name


def test_settings_that_are_named_exist(page):
    sections = yaml.safe_load((ROOT / "conf" / "default.yaml").read_text())
    setting = r"`(\w+)\.([a-z_]+)(?=[`:=])(?<!json)(?<!yaml)"
    for section, key in re.findall(setting, page.read_text()):
        if section in sections and section != "adapters":
            client_keys = sections["federated"]["clients"][0] if section == "federated" else {}
            assert key in sections[section] or key in client_keys, f"{section}.{key}"


def test_readme_is_one_document():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160


@pytest.mark.minutes
@pytest.mark.slow
def test_the_algorithm_on_one_page_runs():
    script = ROOT / "docs" / "one_round.py"
    assert len(script.read_text().splitlines()) <= 80
    result = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    answers = re.findall(r'-> "(.+?)" \(own: "(.+?)"\)', result.stdout)
    assert len(answers) == 2 and len({own for _, own in answers}) == 2

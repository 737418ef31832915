"""Every Python block of README and docs runs, in the order of its page."""

import ast
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.models import Classifier, mlp

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "docs/start.md", "docs/recipes.md"]
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
ELSEWHERE = ("devices=4",)  # needs machines that a test has not: only parsed


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(64, 6, generator=generator), torch.arange(64) % 4)
    module = Classifier(mlp(6, 12, 10, 4, act=nn.ReLU), weight_decay=0.01)
    given = {
        "model": module,
        "net": module.net,
        "loader": DataLoader(data, 16),
        "labelled": DataLoader(data, 16),
        "held_out": DataLoader(data, 16),
        "optimizer": torch.optim.SGD(module.parameters(), lr=0.1),
    }
    blocks = BLOCK.findall((ROOT / page).read_text())
    assert len(blocks) >= 3
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*divided|.*TensorBoard|.*log_every_n_steps")
        for block in blocks:
            ast.parse(block)
            if not any(word in block for word in ELSEWHERE):
                exec(compile(block, page, "exec"), given)
    monitors = [value for value in given.values() if getattr(value, "history", None)]
    monitors += [each for value in given.values() for each in getattr(value, "members", [])]
    if page != "README.md":
        assert monitors
        assert all(monitor.history for monitor in monitors)


def test_links_between_pages_lead_somewhere():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s#]+)", text):
            if "://" not in target and page.name not in ("changelog.md", "contributing.md"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_example_is_on_its_page():
    text = (ROOT / "docs" / "examples.md").read_text()
    scripts = {path.name for path in (ROOT / "examples").glob("[a-z]*.py")}
    assert set(re.findall(r"`(\w+\.py)`", text)) == scripts


def test_the_readme_is_short():
    text = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(text.split()) < 750

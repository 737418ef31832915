"""The linear evaluation is the logistic regression it says it is, and takes both ways to a backbone."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("decay", [1e-3, 1e-1])
def test_the_classifier_is_scikit_learns(decay, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from linear_evaluation import fit_linear

    digits = load_digits()
    x = (digits.data - digits.data.mean(0)) / (digits.data.std(0) + 1)
    ours = fit_linear(torch.from_numpy(x), torch.from_numpy(digits.target), classes=10, decay=decay)
    theirs = LogisticRegression(C=1 / (decay * len(x)), tol=1e-10, max_iter=5000).fit(x, digits.target)
    probabilities = torch.softmax(ours(torch.from_numpy(x)), dim=1).detach().numpy()
    assert np.abs(probabilities - theirs.predict_proba(x)).max() < 1e-3


def test_a_checkpoint_and_an_exported_backbone_come_to_the_same(tmp_path):
    command = [sys.executable, str(EXAMPLES / "linear_evaluation.py"), "--smoke", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=240)
    results = json.loads((tmp_path / "linear_evaluation.json").read_text())["results"]
    assert results["checkpoint"] == results["backbone"]
    found = results["checkpoint"]
    assert (found["train_images"], found["test_images"], found["features"]) == (1617, 180, 96)
    assert 0.7 < found["test_accuracy"] <= 1
    assert found["decay"] in map(float, found["held_out_accuracy_by_decay"])
    assert found["train_accuracy"] >= found["test_accuracy"] - 0.05

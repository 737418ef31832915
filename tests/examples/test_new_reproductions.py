"""The reproductions that train many small networks side by side run, and show what they are for."""

import importlib
import json
import math
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name, out, *arguments, file=None):
    command = [
        sys.executable,
        str(EXAMPLES / f"{name}.py"),
        "--smoke",
        "--out",
        str(out),
        *map(str, arguments),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    picture = out / f"{file or name}.png"
    assert picture.stat().st_size > 10_000
    return json.loads((out / f"{file or name}.json").read_text())


def test_relations_rise_with_decay(tmp_path):
    result = run("canonical_representation", tmp_path)
    last = str(max(result["config"]["read_at"]))
    weak, strong = (result["results"][decay][last]["layers"] for decay in ("0.0001", "0.01"))
    for layer in range(1, 4):  # neither the one on raw data nor the output
        assert strong[layer]["least"]["low"] > weak[layer]["least"]["high"]
        assert strong[layer]["a/rank"]["median"] < weak[layer]["a/rank"]["median"]
        # H_b = W H_a W' and G_a = W' G_b W: one side's exponent is the other's and one.
        for a, b in (("h_a", "h_b"), ("g_b", "g_a")):
            assert weak[layer][b]["median"] - weak[layer][a]["median"] == pytest.approx(1, abs=0.2)


def test_noise_makes_linear_networks_alike_and_descent_does_not(tmp_path):
    result = run("trained_apart", tmp_path)["summary"]
    for place in ("same", "across"):
        assert result["sgd"][f"{place}_cooled"]["low"] > 0.95
        assert result["gd"][f"{place}_end"]["median"] < 0.9
        assert result["quiet"][f"{place}_cooled"]["median"] < 0.92
        assert result["sgd"][f"{place}_start"] == result["gd"][f"{place}_start"]


def test_random_laterals_assemble_if_the_output_s_is_held(tmp_path):
    result = run("self_assembly_random", tmp_path, file="self_assembly_random_digits")
    (cell,) = result["compared"].values()
    assert cell["seeds_beyond_frozen"] == result["config"]["seeds"]
    assert min(cell["laterals"]) > 0.2
    assert max(map(abs, cell["laterals_frozen"])) < 0.1
    arms = {cell["arm"]: cell for cell in result["cells"].values()}
    assert arms["plain"]["diverged"] == arms["plain"]["seeds"]
    assert arms["assembled"]["diverged"] == 0
    assert arms["backprop"]["accuracy"]["low"] > 0.85


def test_the_loss_drops_when_units_are_let_go(tmp_path):
    result = run("staircase_intervention", tmp_path)["results"]
    early, late = (result[f"all zero, released at {step}"] for step in (200, 400))
    assert early["halved"] == late["halved"] == early["of"]
    assert late["steps_until_halved"]["median"] == pytest.approx(
        early["steps_until_halved"]["median"], rel=0.1
    )
    assert result["all zero, never released"]["halved"] == 0
    assert result["all zero, decay"]["halved"] == 0
    assert result["all zero, removed, sigma 1"]["halved"] == early["of"]


def test_sgd_stays_nearer_to_its_equilibrium_at_a_smaller_rate(tmp_path):
    result = run("noise_floor", tmp_path)["results"]
    for kind in ("even", "uneven"):
        near, far = result[kind]["rates"]["0.025"], result[kind]["rates"]["0.1"]
        assert near["imbalance"]["high"] < far["imbalance"]["low"]
        assert near["off"]["high"] < far["off"]["low"]
        assert abs(near["top"]["median"] - 1) < abs(far["top"]["median"] - 1)


def test_the_largest_eigenvalue_is_the_closed_form_s_at_the_equilibrium(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = importlib.import_module("noise_floor")
    cov_noise = torch.diag(torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64))
    w, u = example.equilibrium_weights(torch.eye(3).double(), hidden=[4], cov_noise=cov_noise)
    assert example.hessian_top(w.mT, u.mT) == pytest.approx(example.linear_hessian_top([w, u]), rel=1e-9)
    assert example.power([0.1, 0.2, 0.4], [3.0, 6.0, 12.0]) == pytest.approx(1)


def test_students_side_by_side_are_those_trained_alone(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    together, alone = (
        importlib.import_module(name) for name in ("effective_units_course", "effective_units")
    )
    options = Namespace(
        seeds=2, inputs=20, samples=100, scale=0.3, threshold=0.1, read_at=[100, 400], steps=400
    )
    rows = together.course(16, 0.1, options)
    assert list(rows) == [100, 400]
    for seed, row in enumerate(rows[400]):
        single = alone.learn(16, 0.1, options=options, seed=seed)
        assert row["units"] == single["units"]
        for key in ("train", "test"):
            assert row[key] == pytest.approx(single[key], rel=1e-3)


def test_units_in_use_go_on_falling(tmp_path):
    rows = run("effective_units_course", tmp_path)["rows"]
    for name in ("16, 0.1", "48, 0.1"):
        early, late = rows[name]["500"], rows[name]["1500"]
        assert late["units"]["median"] < early["units"]["median"]
        assert late["unrest"]["high"] < early["unrest"]["low"]


def test_curved_units_align_less(tmp_path):
    cells = run("tanh_balance", tmp_path)["cells"]
    straight, curve = cells["gain 0, rate 0.08"], cells["gain 1.5, rate 0.08"]
    assert straight["cosine"]["low"] > curve["cosine"]["high"]
    assert straight["cosine"]["median"] > 0.98


def test_constraints_hold_on_a_network(tmp_path):
    result = run("mirror_symmetry", tmp_path, file="mirror_symmetry_digits")
    cells = result["constraints"]
    for kind in ("sparse", "low_rank"):
        cell = cells[f"{kind}, decay 0.03"]
        assert cell[kind]["low"] > 0.4
        assert cells["plain, decay 0.03"][kind]["high"] < 0.1
        assert cell["accuracy"]["low"] > 0.8
        assert math.isclose(cell["gone"]["median"], cell[kind]["median"], abs_tol=0.05)


def test_random_labels_are_fitted_and_every_arm_is_told(tmp_path):
    result = run("plasticity_random_labels", tmp_path, file="plasticity_random_labels_digits")
    assert {cell["arm"] for cell in result["cells"].values()} == set(result["best"])
    for cell in result["cells"].values():
        assert cell["first"]["low"] > 0.9  # 200 images are within reach
        assert len(cell["course"]) == result["config"]["tasks"]
    assert result["best"]["decay"]["points_over_decay"] == [0, 0]


def test_random_labels_are_fitted_by_convolutions_too(tmp_path):
    file = "plasticity_convolutional_digits"
    result = run("plasticity_random_labels", tmp_path, "--convolutional", file=file)
    assert {cell["arm"] for cell in result["cells"].values()} == set(result["best"])
    for cell in result["cells"].values():
        assert cell["first"]["low"] > 0.6  # of 200 labels at random, in 120 steps
        assert 0 <= cell["dormant"]["low"] <= cell["dormant"]["high"] < 1


def test_relations_of_a_resnet_s_head(tmp_path):
    result = run("canonical_resnet", tmp_path)
    last = str(result["config"]["epochs"])
    weak, strong = (result["results"][decay][last] for decay in ("0.0001", "0.03"))
    assert strong["layers"][0]["least"]["low"] > weak["layers"][0]["least"]["high"]
    assert strong["layers"][0]["ansatz"]["low"] > weak["layers"][0]["ansatz"]["high"]
    assert weak["test_accuracy"]["low"] > 0.2  # of ten classes; rounding differs between processors
    assert len(weak["layers"]) == 2


def test_relations_of_a_head_are_those_of_single_images(monkeypatch):
    """Gradients and moments by a loop over images, each on its own."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = importlib.import_module("canonical_resnet")
    torch.manual_seed(0)
    net = torch.nn.Module()
    net.hidden, net.output = (torch.nn.Linear(i, o, bias=False) for i, o in ((5, 4), (4, 3)))
    z, y = torch.randn(30, 5).double(), torch.randint(3, (30,))
    found = example.head(net, z, y)
    first, second = (layer.weight.detach().double() for layer in (net.hidden, net.output))
    samples: dict[str, list[torch.Tensor]] = {}
    for image, label in zip(z, y, strict=True):
        h = [image, first @ image]
        h += [h[1].clamp_min(0)]
        h += [second @ h[2]]
        g_out = torch.softmax(h[3], 0) - torch.nn.functional.one_hot(label, 3)
        g_hidden = second.mT @ g_out
        g_before = g_hidden * (h[1] > 0)
        for key, value in (
            ("h0a", h[0]),
            ("h0b", h[1]),
            ("h1a", h[2]),
            ("h1b", h[3]),
            ("g0a", first.mT @ g_before),
            ("g0b", g_before),
            ("g1a", g_hidden),
            ("g1b", g_out),
        ):
            samples.setdefault(key, []).append(value / value.norm().clamp_min(1e-300))

    def covariance(rows):
        rows = torch.stack(rows)
        rows = rows - rows.mean(0)
        return rows.mT @ rows / len(rows)

    def correlation(a, b):
        a, b = a - a.mean(), b - b.mean()
        return float((a * b).sum() / (a.norm() * b.norm()))

    for layer, weight in enumerate((first, second)):
        for side, gram in (("a", weight.mT @ weight), ("b", weight @ weight.mT)):
            h, g = (covariance(samples[f"{what}{layer}{side}"]) for what in "hg")
            row = found[layer]
            assert row[f"{side}/rga"] == pytest.approx(correlation(h, g), abs=1e-9)
            assert row[f"{side}/rwa"] == pytest.approx(correlation(h, gram), abs=1e-9)
            assert row[f"{side}/gwa"] == pytest.approx(correlation(g, gram), abs=1e-9)
    assert found[1]["ansatz"] == pytest.approx(1, abs=0.1)  # of the output it is an identity


def test_the_stack_s_adam_is_adam(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example, stacked = (importlib.import_module(name) for name in ("plasticity_random_labels", "_stacked"))
    stack = stacked.Stack([3, 4, 2], seeds=[0, 1], dtype=torch.float64)
    points = [torch.zeros_like(weight) for weight in stack.weights]
    decay = torch.tensor([0.0, 0.1], dtype=torch.float64).view(-1, 1, 1)
    ours = example.Adam(stack, lr=0.05, decay=decay, points=points)
    alone = [[w.detach()[k].clone().requires_grad_() for w in stack.weights] for k in range(2)]
    theirs = [torch.optim.Adam(alone[k], lr=0.05, weight_decay=float(decay[k])) for k in range(2)]
    x, y = torch.randn(6, 3).double(), torch.randn(6, 2).double()
    for _ in range(15):
        ours.step((stack.outputs(x.expand(2, -1, -1)) - y).square().sum())
        for weights, optimizer in zip(alone, theirs, strict=True):
            optimizer.zero_grad()
            (torch.relu(x @ weights[0]) @ weights[1] - y).square().sum().backward()
            optimizer.step()
    for k in range(2):
        for weight, expected in zip(stack.weights, alone[k], strict=True):
            assert torch.allclose(weight[k], expected, atol=1e-9)


def test_collapse_and_alignment_are_told_of_the_same_networks(tmp_path):
    result = run("collapse_and_alignment", tmp_path, file="collapse_and_alignment_digits")
    bare, decayed = result["results"]["0"], result["results"]["0.003"]
    assert bare["train_accuracy"]["low"] > 0.95
    assert decayed["train_nc1"]["high"] < bare["train_nc1"]["low"]
    for end in ("low", "high"):  # of two seeds, each beside its own
        assert decayed["layers"][-1]["a/rga"][end] > bare["layers"][-1]["a/rga"][end]
    assert len(bare["layers"]) == result["config"]["depth"]
    assert result["rank_correlation_with_nc1"]["a/rga"] < 0


def test_noise_lengthens_weights_of_a_scale_symmetry_as_the_law_says(tmp_path):
    result = run("noise_and_scale", tmp_path)
    for net in "AB":
        sgd, descent, decayed = (
            result["norms"][f"net {net}, {how}"] for how in ("SGD", "GD", "SGD with decay")
        )
        assert sgd["growth"]["low"] > 1.4
        assert descent["growth"]["high"] < 1.1
        assert decayed["growth"]["high"] < 1
        for cell in (sgd, descent, decayed):
            assert cell["law_error"]["high"] < 1e-12
    sharpness = result["sharpness"]
    noisy, still = (
        [sharpness[f"{start}, {how}"]["end"]["median"] for start in ("kaiming", "xavier")]
        for how in ("SGD", "GD")
    )
    assert abs(noisy[0] - noisy[1]) < 0.5 * abs(still[0] - still[1])  # one end, whatever the start
    for name, cell in sharpness.items():
        if name.endswith("SGD"):  # of linear layers: with units that are not linear it is another one
            assert cell["end"]["median"] == pytest.approx(1, abs=0.1)


def test_measured_exponents_name_the_predicted_phases(tmp_path):
    result = run("feature_phases", tmp_path)
    assert result["agree"] == {"regime": 1, "pace": 1}
    for cell in result["cells"]:
        assert cell["learned"]
        # r grows as scale * width * variance, the kernel as that times the scale.
        size = cell["output_scale"] + 1 + cell["var_u"]
        assert cell["size_exponent"]["median"] == pytest.approx(size, abs=0.12)
        assert cell["kernel_exponent"]["median"] == pytest.approx(size + cell["output_scale"], abs=0.12)


def test_noise_fixes_the_size_of_representations_and_descent_does_not(tmp_path):
    result = run("representation_normalisation", tmp_path)["results"]
    for key in ("first", "second"):
        noisy, still = (
            [cell[key]["median"] for cell in result[f"linear, {how}"].values()] for how in ("SGD", "GD")
        )
        assert max(noisy) / min(noisy) < 1.1 < 1.5 < max(still) / min(still)
        assert noisy == pytest.approx([1, 1, 1], abs=0.1)
    cosines = {how: [c["cosine"] for c in result[f"tanh, {how}"].values()] for how in ("SGD", "GD")}
    assert min(c["low"] for c in cosines["SGD"]) > min(c["median"] for c in cosines["GD"])


def test_large_weights_generalise_worse_where_they_fit_equally(tmp_path):
    result = run("feature_scales", tmp_path)
    small, ordinary = (result["results"][scale] for scale in ("0.1", "1"))
    assert small["fitted"] == ordinary["fitted"] == result["config"]["seeds"]
    assert small["test_accuracy"]["low"] > ordinary["test_accuracy"]["high"]
    assert small["kernel_change"]["low"] > ordinary["kernel_change"]["high"]


def test_tangent_kernels_of_a_stack_are_jacobian_products(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example, stacked = (importlib.import_module(name) for name in ("feature_scales", "_stacked"))
    stack = stacked.Stack([5, 6, 3], seeds=[0, 1], dtype=torch.float64)
    x = torch.randn(4, 5).double()
    found, bound = example.kernels(stack, x), example.stiffness(stack, x.expand(2, -1, -1)).detach()
    for k in range(2):
        rows = []
        for image in x:
            weights = [w.detach()[k].clone().requires_grad_() for w in stack.weights]
            out = torch.relu(image @ weights[0]) @ weights[1]
            gradients = [torch.autograd.grad(o, weights, retain_graph=True) for o in out]
            rows.append(torch.stack([torch.cat([g.flatten() for g in each]) for each in gradients]))
        exact = torch.stack([torch.stack([(a * b).sum() for b in rows]) for a in rows])
        torch.testing.assert_close(found[k], exact)
        curvature = torch.linalg.eigvalsh(torch.cat(rows) @ torch.cat(rows).mT / len(x))[-1]
        assert float(curvature) <= float(bound[k]) <= float(exact.diagonal().mean())

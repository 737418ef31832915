"""Every public function of functional and losses, against everything that is no input for it.

What is not finite gives NaN, what is wrong an error of our own that names the argument: never an error from
inside torch, never a plausible number. A new function without a row in the table fails.
"""

import ast
import functools
import importlib
import inspect
import math
import pkgutil
import re
import traceback
from pathlib import Path

import pytest
import torch

import lightning_sym

ROOT = Path(lightning_sym.__file__).parent


def public_functions():
    found = {}
    for package in ("functional", "losses"):
        for path in pkgutil.iter_modules([str(ROOT / package)]):
            if not path.name.startswith("_"):
                module = importlib.import_module(f"lightning_sym.{package}.{path.name}")
                for name, function in vars(module).items():
                    if (
                        inspect.isfunction(inspect.unwrap(function))
                        and function.__module__ == module.__name__
                    ):
                        found.setdefault(name, function)
    return {name: function for name, function in found.items() if not name.startswith("_")}


FUNCTIONS = public_functions()


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def psd(d, seed=0):
    x = gaussian(2 * d, d, seed=seed)
    return x.mT @ x / len(x)


X, Y, Z = gaussian(8, 4), gaussian(8, 4, seed=1), gaussian(8, 4, seed=2)
A, B, C = psd(4), psd(4, 1), psd(4, 2)
IMAGES, OTHERS = gaussian(6, 5, 5), gaussian(6, 5, 5, seed=1)
LABELS = torch.arange(8) % 3
HEAD = gaussian(3, 4, seed=3)
SUMS = torch.zeros(3, 4).index_add(0, LABELS, X)
COUNTS = torch.tensor([3, 3, 2])
METRIC = A[:2, :2].expand(3, 3, 2, 2).clone()


def one_dict(function, **tensors):
    return function(tensors)


def one_list(function, **tensors):
    return function(list(tensors.values()))


def halves(function, a_halves, again, b_halves):
    return function((a_halves, again), b_halves)


def hessian_times_vector(function, loss, parameters, vector):
    parameters = parameters.requires_grad_(parameters.is_floating_point() or parameters.is_complex())
    return function(loss * (parameters**3).sum(), [parameters])(vector)


def trace(function, product):
    return function(lambda v: (product * v).sum(1), [4], vectors=2)


def top(function, product):
    return function(lambda v: (product * v).sum(1), 4, steps=3)


def kernel(function, parameters, x, **numbers):
    parameters = parameters.requires_grad_(parameters.is_floating_point() or parameters.is_complex())
    return function(lambda x: (x @ parameters.mT).square(), [parameters], x, **numbers)


def step_by_step(function, **numbers):
    return function(list(numbers.pop("steps")), list(numbers.pop("losses")), **numbers)


def ranked(function, ranks, **numbers):
    return function(list(ranks), **numbers)


def told(function, **numbers):
    return function(0.1, **{"alignment_after": 0.2, "norm_ratio": 1.0, **numbers})


#: By function: good tensors by argument (with how to call it, where not by name).
TABLE = {
    "second_moment": {"samples": X},
    "matrix_alignment": {"a": A, "b": B},
    "crh_relations": {"h": A, "g": B, "z": C},
    "alignment_null": {"a": A, "b": B},
    "expected_alignment": {"a": A, "b": B},
    "side_alignments": {"h": A, "g": B, "z": C, "call": one_dict},
    "random_rotation": {},
    "pah_exponent": {"matrix": A, "reference": B},
    "pah_exponents": {"h": A, "g": B, "z": C},
    "side_exponents": {"h": A, "g": B, "z": C, "call": one_dict},
    "mechanism": {"call": told},
    "pah_phase": {"h_a": torch.tensor(1.0), "h_b": torch.tensor(1.0), "g_b": torch.tensor(1.0),
                  "g_a": torch.tensor(1.0), "decades": torch.tensor(2.0)},
    "relative_error": {"images": IMAGES, "targets": OTHERS},
    "find_bump": {"images": IMAGES, "centers": torch.ones(6, 2)},
    "metric_tensor": {"features": gaussian(3, 4, 5)},
    "volume_element": {"metric": METRIC},
    "factorisation": {"metric": METRIC},
    "explained": {"images": IMAGES, "candidates": OTHERS},
    "superposition": {"images": IMAGES, "x_parts": OTHERS, "y_parts": OTHERS.flip(0)},
    "outer_product_rank": {"images": IMAGES},
    "memorisation": {"images": IMAGES, "training": OTHERS},
    "linear_readout": {"features": X, "coordinates": Y[:, :2], "test_features": Z,
                       "test_coordinates": X[:, :2]},
    "cosine": {"a": X, "b": Y},
    "relative_distance": {"a": X, "b": Y},
    "hessian_product": {"loss": torch.tensor(1.0), "parameters": X[0], "vector": Y[0],
                        "call": hessian_times_vector},
    "hutchinson_trace": {"product": A, "call": trace},
    "lanczos_top": {"product": A, "call": top},
    "stability_line": {},
    "batched_eigvalsh": {"matrices": A, "again": B, "call": one_list},
    "batched_eigh": {"matrices": A, "again": B, "call": one_list},
    "low_rank_eigvalsh": {"matrix": A},
    "low_rank_eigh": {"matrix": A},
    "cross_covariance_eigenvalues": {"z_a": X, "z_b": Y},
    "covariance_eigenvalues": {"z": X},
    "variance_share": {"z": X},
    "mode_dates": {"steps": torch.arange(3.0), "eigenvalues": gaussian(3, 2), "level": torch.zeros(2)},
    "step_likeness": {"eigenvalues": torch.tensor([[0.0, 0.0], [0.5, 0.2]]), "final": torch.ones(2)},
    "breaking_distance": {"distance": torch.rand(3), "norm": torch.rand(3)},
    "unit_clusters": {"distances": torch.cdist(X, Y)[None].clone()},
    "loss_phases": {"steps": torch.arange(1.0, 5.0), "losses": torch.tensor([1.0, 0.5, 0.1, 0.01]),
                    "call": step_by_step},
    "depth_roles": {"ranks": torch.tensor([1.0, 2.0, 3.0]), "call": ranked},
    "gram_alignment": {"a": X, "b": Y},
    "nearest_mean_disagreements": {"features": X, "class_counts": COUNTS, "class_sums": SUMS,
                                   "weight": HEAD, "bias": HEAD[:, 0]},
    "neighbour_vote": {"queries": X, "bank": Y, "labels": LABELS},
    "linear_classifier": {"features": X, "labels": LABELS},
    "neural_collapse": {"features": X, "labels": LABELS, "weight": HEAD, "bias": HEAD[:, 0]},
    "neural_collapse_from_sums": {"class_counts": COUNTS, "class_sums": SUMS, "second_sum": X.mT @ X,
                                  "weight": HEAD, "bias": HEAD[:, 0]},
    "power_law": {"x": torch.rand(5), "y": torch.rand(5)},
    "student_t": {},
    "effective_rank": {"features": X},
    "effective_rank_from_eigenvalues": {"eigenvalues": X[0].abs()},
    "participation_ratio": {"features": X},
    "participation_ratio_from_covariance": {"covariance": A},
    "stable_rank": {"matrix": X},
    "numerical_rank": {"matrix": X},
    "numerical_rank_from_eigenvalues": {"eigenvalues": X[0].abs()},
    "split_alignment": {"a_halves": A, "again": A + 0.1 * B, "b_halves": C, "call": halves},
    "split_expected_alignment": {"a_halves": A, "again": A + 0.1 * B, "b_halves": C, "call": halves},
    "split_side_alignments": {"h": A, "g": B, "z": C, "call": one_dict},
    "split_participation_ratio": {"first": A, "second": B},
    "readouts": {},
    "tangent_kernel": {"parameters": HEAD, "x": X, "call": kernel},
    "kernel_move": {"before": A, "after": B},
    "layer_alignment": {"inputs": X, "weight": HEAD},
    "dormant_scores": {"mean_abs": X[0].abs()},
    "dormant_fraction_from_scores": {"mean_abs": X[0].abs()},
    "dormant_fraction": {"activations": X},
    "dead_fraction": {"activations": X},
    "zero_units": {"weight": X, "bias": X[:, 0]},
    "zero_units_from_norms": {"norms": X[0].abs()},
    "distinct_units": {"weight": X, "bias": X[:, 0], "outgoing": Y.mT.contiguous()},
    "unit_groups": {"weight": X, "bias": X[:, 0], "outgoing": Y.mT.contiguous()},
    "cross_correlation": {"z_a": X, "z_b": Y},
    "barlow_twins_loss": {"z_a": X, "z_b": Y},
    "cross_covariance": {"z_a": X, "z_b": Y},
    "cross_covariance_loss": {"z_a": X, "z_b": Y},
    "nt_xent_loss": {"z_a": X, "z_b": Y},
    "invariance_term": {"z_a": X, "z_b": Y},
    "variance_term": {"z": X},
    "covariance_term": {"z": X},
    "vicreg_loss": {"z_a": X, "z_b": Y},
}  # fmt: skip
#: Arguments without a default that are no tensors.
NUMBERS = {
    "random_rotation": {"size": 3, "generator": torch.Generator()},
    "stability_line": {"lr": 0.1},
    "unit_clusters": {"threshold": 0.5},
    "low_rank_eigvalsh": {"rank": 4},
    "low_rank_eigh": {"rank": 4},
    "neighbour_vote": {"classes": 3},
    "linear_classifier": {"classes": 3},
    "student_t": {"confidence": 0.9, "degrees": 3},
    "readouts": {"outputs": 3, "most": 2},
}
#: Whole numbers are good here.
WHOLE = {"labels", "class_counts", "steps", "centers", "coordinates", "test_coordinates", "level", "ranks",
         "losses", "h_a", "h_b", "g_b", "g_a", "decades", "product", "loss", "parameters",
         "vector"}  # fmt: skip
#: What a corruption means is documented otherwise for these.
OTHERWISE = {
    ("power_law", "x", "values"): "points that are not positive and finite are left out",
    ("power_law", "y", "values"): "points that are not positive and finite are left out",
    ("loss_phases", "losses", "values"): "readings that are not positive and finite are passed over",
    ("neural_collapse_from_sums", "bias", "values"): "no measure depends on it",
    ("unit_clusters", "distances", "infinite"): "joins nothing",
    ("nearest_mean_disagreements", "features", "empty"): "no sample, no disagreement",
    ("power_law", "x", "empty"): "refused with y: one length",
    ("cosine", "a", "empty"): "several tensors, which may be empty",
    ("cosine", "b", "empty"): "several tensors, which may be empty",
    ("depth_roles", "ranks", "empty"): "no layer, no role",
    ("tangent_kernel", "x", "empty"): "the user's function reads it",
    ("tangent_kernel", "x", "shape"): "the user's function reads it",
    ("tangent_kernel", "x", "dtype"): "the user's function reads it",
    ("tangent_kernel", "parameters", "shape"): "the user's function reads them",
    ("tangent_kernel", "x", "mixed"): "the user's function reads it",
    ("tangent_kernel", "parameters", "mixed"): "the user's function reads them",
}
#: Where infinite input may read infinite, and why.
INFINITE = {
    "hessian_product": "linear in the vector",
    "cross_covariance": "linear in each embedding",
    "cross_covariance_loss": "embeddings that are infinitely apart have an infinite loss",
    "invariance_term": "embeddings that are infinitely apart have an infinite loss",
}
SEQUENCES = {"steps", "losses", "ranks"}
SCALARS = {"h_a", "h_b", "g_b", "g_a", "decades", "loss", "level"}


def has_nan(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return any(map(has_nan, value))
    if isinstance(value, torch.Tensor):
        return bool((value if value.is_floating_point() else value.float()).isnan().any())
    return isinstance(value, float) and math.isnan(value)


@functools.cache
def raises_in(file):
    tree = ast.parse(Path(file).read_text())
    return [(node.lineno, node.end_lineno) for node in ast.walk(tree) if isinstance(node, ast.Raise)]


def outcome(name, tensors, *, argument, numbers=None):
    """Return a word for what a call came to: "nan", "refused" or what is wrong."""
    tensors = dict(tensors)
    call = tensors.pop("call", None)
    tensors = {key: value.clone() for key, value in tensors.items()}
    more = {**NUMBERS.get(name, {}), **(numbers or {})}
    tensors = {key: value for key, value in tensors.items() if key not in more}
    function = FUNCTIONS[name]
    try:
        value = call(function, **tensors, **more) if call else function(**tensors, **more)
    except (TypeError, ValueError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        ours = str(ROOT) in last.filename and any(a <= last.lineno <= b for a, b in raises_in(last.filename))
        if not ours:
            return f"from inside torch: {error}"
        known = {argument, *({"matrices"} if call in (one_dict, one_list) else ()), *(
            {"a_halves", "b_halves"} if argument == "again" else ()
        )}  # fmt: skip
        return (
            "refused"
            if any(re.search(rf"\b{word}\b", str(error)) for word in known)
            else f"names not: {error}"
        )
    except Exception as error:
        return f"raw {type(error).__name__}: {error}"
    if isinstance(value, torch.Tensor) and value.is_floating_point() and value.isinf().any():
        return "infinite"
    return "nan" if has_nan(value) else f"a number: {str(value)[:80]}"


def rows():
    return [(name, argument) for name, tensors in TABLE.items() for argument in tensors if argument != "call"]


each_tensor = pytest.mark.parametrize(("name", "argument"), rows())


def test_every_public_function_has_a_row():
    assert set(TABLE) == set(FUNCTIONS)
    for name, tensors in TABLE.items():
        if tensors:  # and its good input is good
            value = outcome(name, tensors, argument="")
            assert value.startswith("a number") or name in {"find_bump", "mode_dates"}, (name, value)


def corrupted(name, argument, tensor):
    return {**TABLE[name], argument: tensor}


@each_tensor
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_reads_nan_or_is_refused(name, argument, bad):
    kind = "infinite" if math.isinf(bad) else "values"
    good = TABLE[name][argument]
    if (name, argument, kind) in OTHERWISE or (name, argument, "values") in OTHERWISE or argument == "labels":
        return
    for at in {0, good.numel() // 2, good.numel() - 1}:
        tensor = good.clone() if good.is_floating_point() else good.double()
        if name == "unit_clusters" and at in (0, good.numel() - 1):
            continue  # the diagonal is not read
        tensor.view(-1)[at] = bad
        found = outcome(name, corrupted(name, argument, tensor), argument=argument)
        assert found in ("nan", "refused") or (found == "infinite" and kind == found and name in INFINITE)
    whole = torch.full_like(good.double() if not good.is_floating_point() else good, bad)
    found = outcome(name, corrupted(name, argument, whole), argument=argument)
    assert found in ("nan", "refused") or (found == "infinite" and kind == found and name in INFINITE)


@each_tensor
def test_sparse_tensors_are_refused_by_name(name, argument):
    good = TABLE[name][argument]
    if (
        not good.ndim
        or (name, argument, "dtype") in OTHERWISE
        or argument in SEQUENCES | SCALARS | {"labels"}
    ):
        return
    tensor = good.to_sparse()
    assert outcome(name, corrupted(name, argument, tensor), argument=argument) == "refused"


@each_tensor
def test_complex_and_whole_numbers_are_refused_by_name(name, argument):
    good = TABLE[name][argument]
    if (name, argument, "dtype") in OTHERWISE:
        return
    if argument not in SEQUENCES or name == "mode_dates":
        tensor = good.to(torch.complex64) * (1 + 1j)
        assert outcome(name, corrupted(name, argument, tensor), argument=argument) == "refused"
    if argument not in WHOLE:
        tensor = (10 * good).to(torch.int64)
        assert outcome(name, corrupted(name, argument, tensor), argument=argument) == "refused"
        assert outcome(name, corrupted(name, argument, good > 0), argument=argument) == "refused"


@each_tensor
def test_empty_and_misshapen_ones_are_refused(name, argument):
    good = TABLE[name][argument]
    if argument in SCALARS | {"product"}:
        return
    names = (argument,) if len(TABLE[name]) == 1 else tuple(TABLE[name])
    shapes = {"empty": [good[:0]], "shape": []}
    if argument not in SEQUENCES:
        shapes["empty"] += [good[..., :0]]
        shapes["shape"] += [good[0], good[None, None], good.reshape(-1)]
        if len(TABLE[name]) > 1 + ("call" in TABLE[name]):
            shapes["shape"] += [torch.cat([good, good[:1]]), torch.cat([good, good[..., :1]], dim=-1)]
    for kind, tensors in shapes.items():
        if (name, argument, kind) in OTHERWISE:
            continue
        for tensor in tensors:
            if tensor.shape == good.shape:
                continue
            found = {outcome(name, corrupted(name, argument, tensor), argument=other) for other in names}
            assert not any(word.startswith(("raw", "from inside")) for word in found), (tensor.shape, found)
            free = kind == "shape" and (name, argument) in FREE_SHAPES
            assert "refused" in found or free, (tensor.shape, found)


#: Of no one shape: of any number of samples, features, classes or trailing dimensions.
FREE_SHAPES = {
    ("find_bump", "images"), ("memorisation", "images"), ("memorisation", "training"),
    ("volume_element", "metric"), ("factorisation", "metric"), ("metric_tensor", "features"),
    ("hessian_product", "parameters"),
    ("step_likeness", "eigenvalues"), ("gram_alignment", "a"), ("gram_alignment", "b"),
    ("nearest_mean_disagreements", "features"), ("neighbour_vote", "queries"),
    ("linear_classifier", "features"), ("layer_alignment", "inputs"), ("layer_alignment", "weight"),
    ("zero_units", "weight"), ("distinct_units", "weight"), ("distinct_units", "outgoing"),
    ("unit_groups", "weight"), ("unit_groups", "outgoing"),
}  # fmt: skip


@each_tensor
def test_mixed_precision_is_computed_in_the_wider_one_or_refused(name, argument):
    tensors = {key: t for key, t in TABLE[name].items() if key != "call" and t.is_floating_point()}
    if argument not in tensors or len(tensors) < 2 or (name, argument, "mixed") in OTHERWISE:
        return
    found = outcome(name, corrupted(name, argument, TABLE[name][argument].double()), argument=argument)
    assert found == "refused" or found.startswith("a number") or name in {"find_bump", "mode_dates"}


def scalars():
    for name, function in FUNCTIONS.items():
        for parameter in inspect.signature(function).parameters.values():
            given = NUMBERS.get(name, {}).get(parameter.name, parameter.default)
            numeric = isinstance(given, int | float) and not isinstance(given, bool)
            if parameter.name != "seed" and (numeric or parameter.name in ("scale", "spacing", "sketch")):
                yield name, parameter.name


#: Numbers that may be negative.
SIGNED = {"background", "amplitude", "level", "threshold", "steep", "flat"}


@pytest.mark.parametrize(("name", "argument"), list(scalars()))
def test_numbers_out_of_range_are_refused_by_name(name, argument):
    for bad in (math.nan, math.inf, -math.inf, -1, -0.5):
        if (
            math.isfinite(bad)
            and argument in SIGNED
            and not (name.startswith("dormant") or name == "pah_phase")
        ):
            continue
        found = outcome(name, TABLE[name], argument=argument, numbers={argument: bad})
        assert found in ("nan", "refused"), (bad, found)

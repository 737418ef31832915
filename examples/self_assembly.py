"""Does a circuit that never transports a weight learn as well as backprop, and does it wire itself for it?

A fully connected circuit under four rules, from random initial connectivity, next to backprop from the same
ascending weights: accuracy, the angle of feedback to forward weights, the angle of the updates to
backprop's. Rules named four_synapse are a reconstruction: the equations of "Self-Assembly of a Biologically
Plausible Learning Circuit" (2024, arXiv 2412.20018) were not available. ``--search`` tries settings on held
out training images and writes down every one of them, diverged ones too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _report import save, spread, table
from _trainer import quiet_trainer
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from lightning_sym.callbacks import CircuitMonitor
from lightning_sym.engine.schedule import LogSpaced
from lightning_sym.papers.learning_circuit import CircuitDivergenceError, FourSynapse, LearningCircuit

Data = tuple[Tensor, Tensor]
Setting = dict[str, Any]
COLUMNS = ("lr", "decay", "lateral_rate", "unit_rows")


def four(laterals: str, **setting: Any) -> Setting:
    """Return a setting of the four-synapse rule."""
    return {"rule": "four_synapse", "laterals": laterals, **setting}


#: By rule and by how laterals begin, the best settings of the search (``--search``) that diverged on no seed.
#: On MNIST, of positive laterals the second best; of random ones, which all diverged, the digits' setting.
CHOSEN: dict[str, dict[str, Setting]] = {
    "digits": {
        "backprop": {"rule": "backprop", "lr": 0.3, "decay": 1e-3},
        "kolen_pollack": {"rule": "kolen_pollack", "lr": 0.3, "decay": 1e-4},
        "feedback_alignment": {"rule": "feedback_alignment", "lr": 0.1, "decay": 0.0},
        "four_synapse, identity": four("identity", lr=0.3, decay=1e-2, lateral_rate=0.01, unit_rows=True),
        "four_synapse, positive": four("positive", lr=0.003, decay=1e-3, lateral_rate=0.01, unit_rows=False),
        "four_synapse, random": four("random", lr=0.003, decay=1e-1, lateral_rate=0.01, unit_rows=True),
    },
    "mnist": {
        "backprop": {"rule": "backprop", "lr": 0.3, "decay": 0.0},
        "kolen_pollack": {"rule": "kolen_pollack", "lr": 0.1, "decay": 1e-3},
        "feedback_alignment": {"rule": "feedback_alignment", "lr": 0.1, "decay": 1e-3},
        "four_synapse, identity": four("identity", lr=0.1, decay=1e-3, lateral_rate=0.1, unit_rows=True),
        "four_synapse, positive": four("positive", lr=0.003, decay=1e-3, lateral_rate=0.01, unit_rows=False),
        "four_synapse, random": four("random", lr=0.003, decay=1e-1, lateral_rate=0.01, unit_rows=True),
    },
}
CHOSEN["fashion-mnist"] = CHOSEN["mnist"]


def tensors(options: argparse.Namespace) -> tuple[Data, Data, str]:
    """Return standardised training and test images in rows, with labels, and the name of the images."""
    if options.data is None:
        from sklearn.datasets import load_digits

        stored = load_digits()
        x, y = torch.tensor(stored.data).float(), torch.tensor(stored.target)
        test = torch.arange(len(x)) % 5 == 0
        parts, name = [(x[~test], y[~test]), (x[test], y[test])], "digits"
    else:
        from torchvision import datasets

        reader = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST}[options.images]
        both = [reader(options.data, train=train) for train in (True, False)]
        parts, name = [(part.data.flatten(1).float(), part.targets) for part in both], options.images
    mean, std = parts[0][0].mean(), parts[0][0].std()
    train, test_part = (((x - mean) / std, y.long()) for x, y in parts)
    return train, test_part, name


class Anneal(Callback):
    """Lets the learning rate fall to zero on a straight line."""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the rate of the coming step."""
        anneal(trainer.optimizers[0], trainer.global_step / trainer.estimated_stepping_batches)


def anneal(optimizer: torch.optim.Optimizer, done: float) -> None:
    """Set the learning rate when a share of the steps has been made."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * (1 - done)


def train(
    setting: Setting, train: Data, test: Data, *, seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Fit one circuit; return its accuracy, or what it said when it diverged, and the monitor's rows.

    A search steps without a Trainer, which is several times faster for circuits as small as these.
    """
    x, y = train
    rule: Any = setting["rule"]
    if rule == "four_synapse":
        rule = FourSynapse(
            setting["lateral_rate"], laterals=setting["laterals"], unit_rows=setting["unit_rows"]
        )
    layers, shared = [*options.hidden, 10], {"lr": setting["lr"], "decay": setting["decay"], "seed": seed}
    module = LearningCircuit((x.shape[1],), layers=layers, rule=rule, **shared)
    order = RandomSampler(range(len(x)), generator=torch.Generator().manual_seed(seed))
    batches = BatchSampler(order, options.batch, drop_last=True)
    monitor = CircuitMonitor(every_n_steps=LogSpaced(options.readings), pictures=False, strict=True)
    try:
        if options.search:
            optimizer = module.configure_optimizers()
            for epoch in range(options.epochs):
                for k, index in enumerate(batches):
                    anneal(optimizer, (epoch + k / len(batches)) / options.epochs)
                    module.learn((x[index], y[index]), optimizer)
        else:
            trainer = quiet_trainer(
                max_epochs=options.epochs,
                callbacks=[Anneal(), monitor],
            )
            trainer.fit(module, DataLoader(TensorDataset(x, y), sampler=batches, batch_size=None))
    except CircuitDivergenceError as error:
        return {"accuracy": None, "diverged": str(error), "history": []}
    with torch.no_grad():
        accuracy = float((module(test[0]).argmax(1) == test[1]).double().mean())
    return {"accuracy": accuracy, "diverged": "", "history": monitor.history}


def grid(*, smoke: bool) -> list[Setting]:
    """Return the settings that the search tries."""
    found: list[Setting] = []
    for rule, decays in (
        ("backprop", (0.0, 1e-3)),
        ("feedback_alignment", (0.0, 1e-3)),
        ("kolen_pollack", (1e-4, 1e-3, 1e-2)),
    ):
        for lr, decay in itertools.product((0.1, 0.3, 1.0), decays):
            found.append({"rule": rule, "lr": lr, "decay": decay})
    for laterals, lrs, decays, rates in (
        ("identity", (0.1, 0.3), (1e-4, 1e-3, 1e-2), (0.01, 0.1, 1.0)),
        ("positive", (0.003, 0.03), (1e-3, 1e-1), (0.01, 1.0)),
        ("random", (0.003, 0.03), (1e-3, 1e-1), (0.01, 1.0)),
    ):
        for lr, decay, rate, unit in itertools.product(lrs, decays, rates, (True, False)):
            found.append(four(laterals, lr=lr, decay=decay, lateral_rate=rate, unit_rows=unit))
    return found[::10] if smoke else found


def group(setting: Setting) -> str:
    """Return the name under which a setting competes."""
    return ", ".join([setting["rule"], *([setting["laterals"]] if "laterals" in setting else [])])


def search(options: argparse.Namespace) -> None:
    """Try every setting once, in each group the best again until two are stable over seeds; write all down.

    A file of the same name in ``--out`` is gone on with.
    """
    (x, y), _, name = tensors(options)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held = min(len(x) // 5, 5000)
    test, kept = order[:held], order[held:][: options.search_train]
    parts = ((x[kept], y[kept]), (x[test], y[test]))
    config = {"images": name, "train": len(kept), "held_out": held, **settings(options)}
    file = options.out / f"self_assembly_search_{name}.json"
    before = json.loads(file.read_text()) if file.exists() else {"config": config, "tried": []}
    if before["config"] != config:
        raise SystemExit(f"{file} holds another search: {before['config']}")
    rows: list[dict[str, Any]] = before["tried"]
    for setting in grid(smoke=options.smoke):
        if any(setting.items() <= row.items() for row in rows):
            continue
        rows.append({"group": group(setting), **setting, "accuracy": [], "diverged": ""})
        again(rows[-1], parts, seeds=1, options=options)
        save(options.out, file.stem, {"config": config, "tried": rows})
        print(rows[-1], flush=True)
    best: dict[str, Any] = {}
    kinds = {kind: [row for row in rows if row["group"] == kind] for kind in dict.fromkeys(map(group, rows))}
    for kind, members in kinds.items():
        able = [row for row in members if row["accuracy"][0] is not None]
        stable: list[dict[str, Any]] = []
        for row in sorted(able, key=lambda row: -row["accuracy"][0]):
            if len(stable) < 2:
                again(row, parts, seeds=options.seeds, options=options)
                stable += [row] * (not row["diverged"])
        if stable:
            best[kind] = max(stable, key=lambda row: spread(row["accuracy"])["mean"])
    print(
        table(
            [(k, *(r.get(c, "") for c in COLUMNS), spread(r["accuracy"])["mean"]) for k, r in best.items()],
            ("best of", *COLUMNS, "accuracy"),
        )
    )
    counts = {
        k: {"tried": len(r), "diverged": sum(bool(row["diverged"]) for row in r)} for k, r in kinds.items()
    }
    save(options.out, file.stem, {"config": config, "counts": counts, "best": best, "tried": rows})


def again(row: dict[str, Any], parts: tuple[Data, Data], *, seeds: int, options: argparse.Namespace) -> None:
    """Fit a setting until it has been fitted with so many seeds; note when one of them diverged."""
    for seed in range(len(row["accuracy"]), seeds):
        result = train(row, *parts, seed=seed, options=options)
        row["accuracy"].append(result["accuracy"])
        row["diverged"] = row["diverged"] or result["diverged"]


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return what every fit shares, for the record."""
    return {key: getattr(options, key) for key in ("hidden", "batch", "epochs", "seeds")}


def hidden_mean(row: dict[str, float], what: str, layers: int) -> float:
    """Return the mean of a layer reading over the layers below the output, where they have it."""
    values = [row.get(f"circuit/layers.{k}/{what}", math.nan) for k in range(layers)]
    values = [value for value in values if not math.isnan(value)]
    return sum(values) / len(values) if values else math.nan


def summary(runs: list[dict[str, Any]], layers: int) -> dict[str, Any]:
    """Return accuracy, readings at the end and curves over steps, with their spread over seeds."""
    said = [run["diverged"] for run in runs if run["diverged"]]
    found: dict[str, Any] = {"accuracies": [run["accuracy"] for run in runs], "diverged": len(said)}
    if said:
        return found | {"said": said, "curves": {"step": [], "feedback": [], "update": [], "rank": []}}
    found["accuracy"] = spread(found["accuracies"])
    last = [run["history"][-1] for run in runs]
    found["end"] = {key: finite([row[key] for row in last]) for key in last[0] if key != "step"}
    found["start"] = {
        key: finite([run["history"][0][key] for run in runs])
        for key in last[0]
        if key.endswith(("_cosine", "_residual"))
    }
    curves: dict[str, Any] = {"step": [row["step"] for row in runs[0]["history"]]}
    for name, read in (
        ("feedback", lambda row: row.get("circuit/feedback_cosine", math.nan)),
        ("update", lambda row: hidden_mean(row, "update_cosine", layers)),
        ("rank", lambda row: hidden_mean(row, "W_rank", layers)),
    ):
        values = [[read(row) for row in run["history"]] for run in runs]
        curves[name] = [finite(column) for column in zip(*values, strict=True)]
    return found | {"curves": curves}


def finite(values: Sequence[float]) -> dict[str, float] | None:
    """Return mean and spread, or None where a value is not a number (backprop has no feedback)."""
    return spread(values) if all(map(math.isfinite, values)) else None


def points(accuracies: list[Any], reference: list[Any]) -> list[float]:
    """Return differences in percentage points, seed by seed, where neither diverged."""
    pairs = zip(accuracies, reference, strict=True)
    return [100 * (a - b) for a, b in pairs if a is not None and b is not None]


def draw(results: dict[str, Any], name: str) -> Any:
    """Draw the gap to backprop, and both angles over steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, *others = figure.subplots(1, 3)
    reference = results["backprop"]["accuracies"]
    labels = [rule.replace("four_synapse", "four_synapse*") for rule in results]
    for k, row in enumerate(results.values()):
        gaps = points(row["accuracies"], reference)
        left.plot(gaps, [-k] * len(gaps), "o", color=f"C{k}", markersize=4)
        if row["diverged"]:
            words = f"{row['diverged']} of {len(row['accuracies'])} diverged"
            left.text(
                0.98, -k, words, transform=left.get_yaxis_transform(), fontsize=7, ha="right", va="center"
            )
        for axes, what in zip(others, ("feedback", "update"), strict=True):
            if curve := [point or dict.fromkeys(("mean", "std"), math.nan) for point in row["curves"][what]]:
                mean, std = ([point[s] for point in curve] for s in ("mean", "std"))
                low, high = ([m + sign * d for m, d in zip(mean, std, strict=True)] for sign in (-1, 1))
                axes.plot(row["curves"]["step"], mean, color=f"C{k}", label=labels[k])
                axes.fill_between(row["curves"]["step"], low, high, color=f"C{k}", alpha=0.2, linewidth=0)
    left.set_yticks([-k for k in range(len(results))], [a.replace(", ", ",\n") for a in labels], fontsize=7)
    left.set_ylim(0.5 - len(results), 0.5)
    left.axvline(0, color="0.8", linewidth=0.8, zorder=0)
    left.axvspan(-1, 1, color="0.94", zorder=0)
    left.set_xscale("symlog", linthresh=2)
    ticks = [-90, -30, -10, -3, -1, 0, 1]
    left.set_xticks(ticks, [str(tick) for tick in ticks])
    left.set_xlabel("test accuracy less backprop's, points\n(grey: within 1)")
    left.set_title(f"{name} (* a reconstruction)", fontsize=10)
    for axes, title in zip(
        others, ("cos($W^T$, V), mean over layers", "update and backprop's, cos, hidden"), strict=True
    ):
        axes.set(xscale="log", xlabel="optimizer steps", title=title, ylim=(-0.3, 1.05))
        axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    others[0].legend(fontsize=7, loc="upper left")
    return figure


def compare(options: argparse.Namespace) -> None:
    """Train all rules over seeds; print the table, write JSON and picture."""
    train_part, test, name = tensors(options)
    results: dict[str, Any] = {}
    layers = len(options.hidden)
    for rule, setting in CHOSEN[name].items():
        runs = [train(setting, train_part, test, seed=seed, options=options) for seed in range(options.seeds)]
        results[rule] = {
            "setting": setting,
            "reconstruction": "four_synapse" in rule,
            **summary(runs, layers),
        }
        print(rule, results[rule]["accuracies"], flush=True)
    reference = results["backprop"]["accuracies"]
    rows = []
    for rule, row in results.items():
        gap = points(row["accuracies"], reference)
        row["gap"] = spread(gap) if gap else None  # of the seeds that did not diverge
        kept = [accuracy for accuracy in row["accuracies"] if accuracy is not None]
        told = [spread(kept)[k] if kept else "" for k in ("mean", "std")]
        told.append(row["gap"]["mean"] if gap else "")
        for what, k in itertools.product(("feedback", "update"), (0, -1)):
            point = row["curves"][what][k] if row["curves"][what] else None
            told.append(point["mean"] if point else "")
        rows.append((rule + " (reconstruction)" * row["reconstruction"], *told, row["diverged"]))
    header = (
        "rule",
        "accuracy",
        "std",
        "gap, points",
        "cos(W,V) first",
        "last",
        "cos(dW) first",
        "last",
        "diverged",
    )
    print(f"\n{name}\n{table(rows, header)}")
    parity = {
        rule: abs(row["gap"]["mean"])
        for rule, row in results.items()
        if rule != "backprop" and row["gap"] and not row["diverged"]
    }
    closest = min(parity, key=lambda rule: parity[rule])
    print(f"\nClosest without weight transport: {closest}, parity within {parity[closest]:.2f} points.")
    config = {"images": name, "train": len(train_part[0]), "test": len(test[0]), **settings(options)}
    save(options.out, f"self_assembly_{name}", {"config": config, "rules": results}, draw(results, name))


def main() -> None:
    """Compare the rules, or search their settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/self_assembly"))
    parser.add_argument(
        "--data", type=Path, default=None, help="a torchvision root; default: scikit-learn's digits"
    )
    parser.add_argument("--images", choices=("mnist", "fashion-mnist"), default="mnist", help="of --data")
    parser.add_argument(
        "--hidden", type=int, nargs="+", default=None, help="default: 64 64, or 256 256 with --data"
    )
    parser.add_argument("--epochs", type=int, default=None, help="default: 15, or 3 with --data")
    parser.add_argument("--batch", type=int, default=None, help="default: 32, or 64 with --data")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--readings", type=int, default=8, help="of the monitor, per factor of ten in steps")
    parser.add_argument(
        "--search", action="store_true", help="try settings instead; writes self_assembly_search_*"
    )
    parser.add_argument(
        "--search-train", type=int, default=12_800, help="training images of the search, at most"
    )
    parser.add_argument("--smoke", action="store_true", help="seconds: two seeds, few epochs, few settings")
    options = parser.parse_args()
    large = options.data is not None
    options.hidden = options.hidden or ([256, 256] if large else [64, 64])
    options.epochs = options.epochs or (3 if large else 15)
    options.batch = options.batch or (64 if large else 32)
    if options.smoke:
        options.seeds, options.readings = 2, 2
        options.epochs = 1 if options.search else 3
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
    search(options) if options.search else compare(options)


if __name__ == "__main__":
    main()

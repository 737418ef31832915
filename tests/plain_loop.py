"""A plain loop that is watched: what must work without any extra. Run by its text alone, by two checks."""

import warnings

import torch

from lightning_sym import monitors, watch


def main() -> None:
    """Watch three steps, and look at what was read."""
    warnings.simplefilter("error")
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    chosen = monitors("standard", every_n_steps=1, targets=1, strict=True)
    with watch(net, optimizer, chosen) as watching:
        for _ in range(3):
            x, y = torch.randn(32, 6), torch.randint(3, (32,))
            watching.batch((x, y))
            torch.nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    rows = chosen[0].history
    steps, read = [row["step"] for row in rows], "collapse/score" in rows[-1]
    if steps != [1, 2, 3] or not read:
        raise SystemExit(f"three steps of a plain loop were read as {steps}, with a score: {read}")
    print("watched three steps of a plain loop")  # noqa: T201 - what the checks look for


if __name__ == "__main__":
    main()

"""Write what commands print into ``docs/command.md``: the block after each ``<!-- run: ... -->``.

python docs/_ext/commands.py
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import tempfile
import warnings
from pathlib import Path

PAGE = Path(__file__).parent.parent / "command.md"
BLOCK = re.compile(r"(<!-- run: (.*?) -->\n```text\n)(.*?)(```\n)", re.DOTALL)


class Payload:
    """Would list a folder if it were unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        """Return what unpickling calls."""
        return os.listdir, (".",)


def prepare(folder: Path) -> None:
    """Write the files that the page speaks of."""
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    net = timm.create_model("test_resnet")
    with torch.no_grad():
        net.layer1[0].conv1.weight[:16] = 0
    save_file(net.state_dict(), folder / "sick.safetensors")
    torch.save({"state_dict": {"weight": torch.ones(4, 4)}, "more": Payload()}, folder / "payload.ckpt")


def printed(arguments: str) -> str:
    """Return what a command prints in the current folder, of either stream."""
    from lightning_sym.cli import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main(arguments.split())
    lines = [f"$ lightning-sym {arguments}", *out.getvalue().splitlines()]
    return "".join(f"{line.rstrip()}\n" for line in lines)


def page(text: str) -> str:
    """Return the page with every block run anew."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        prepare(Path(folder))
        return BLOCK.sub(lambda match: match[1] + printed(match[2]) + match[4], text)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))

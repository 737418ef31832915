"""Real architectures, small: what is found is counted, and all of it holds on the module itself."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sym.symmetry import find_symmetries


class GPTBlock(nn.Module):
    """A language model of one block, with attention written out."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.wte, self.wpe = nn.Embedding(11, width), nn.Embedding(16, width)
        self.ln1, self.ln2, self.lnf = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc, self.out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, 11, bias=False)
        self.register_buffer("mask", torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16))

    def forward(self, ids: Tensor) -> Tensor:
        b, t = ids.shape
        x = self.wte(ids) + self.wpe(torch.arange(t))
        q, k, v = (
            part.view(b, t, self.heads, -1).transpose(1, 2)
            for part in self.attn(self.ln1(x)).split(x.shape[-1], dim=2)
        )
        logits = (q @ k.transpose(-2, -1)) * k.shape[-1] ** -0.5
        weights = logits.masked_fill(self.mask[:, :, :t, :t] == 0, float("-inf")).softmax(-1)
        x = x + self.proj((weights @ v).transpose(1, 2).reshape(b, t, -1))
        x = x + self.out(F.gelu(self.fc(self.ln2(x))))
        return self.head(self.lnf(x))


class Last(nn.Module):
    """A recurrent network and a readout of its last state."""

    def __init__(self, cell: type[nn.Module]) -> None:
        super().__init__()
        self.cell, self.head = cell(4, 6, 2, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.norm, self.last = nn.Linear(5, 8), nn.RMSNorm(8), nn.RMSNorm(8)
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        h = self.norm(x)
        return self.out(self.last(x + self.down(F.silu(self.gate(h)) * self.up(h))))


def timm_model(name: str, **options) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=5, **options)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


IDS = torch.arange(14).reshape(2, 7) % 11
CASES = {
    # name: (module, input, numbers of permutations, rescalings, sign flips, rotations, scales)
    "gpt": (GPTBlock, IDS, (5, 5, 5, 2, 1)),
    "lstm": (lambda: Last(nn.LSTM), draw(2, 5, 4), (2, 0, 2, 0, 0)),
    "gru": (lambda: Last(nn.GRU), draw(2, 5, 4), (2, 0, 2, 0, 0)),
    "swiglu": (SwiGLU, draw(2, 5, 5), (2, 3, 4, 0, 1)),
    "encoder": (
        lambda: nn.TransformerEncoderLayer(8, 2, 12, batch_first=True),
        draw(2, 5, 8),
        (4, 3, 2, 2, 1),
    ),
    "resnet18": (lambda: timm_model("resnet18"), draw(2, 3, 32, 32), (12, 12, 20, 0, 20)),
    # Each block: stream's share, heads, q/k, v/o, hidden.
    "vit": (
        lambda: timm_model("vit_tiny_patch16_224", img_size=32, depth=2),
        draw(2, 3, 32, 32),
        (9, 9, 9, 4, 1),
    ),
}


@pytest.mark.parametrize("name", list(CASES))
def test_found_and_true_on_the_module_itself(name):
    make, x, counts = CASES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval().double()
    x = x.double() if x.is_floating_point() else x
    found = find_symmetries(model, x)
    assert found.untraced == ()
    number = Counter(s.kind for s in found)
    assert tuple(number[k] for k in ("permutation", "rescaling", "signflip", "rotation", "scale")) == counts
    with torch.no_grad():
        before = model(x)
        for symmetry in found[:: 1 if len(found) < 40 else 7]:
            state = {n: p.clone() for n, p in model.state_dict().items()}
            symmetry.transform(symmetry.random_element(7))
            # A scale is exact up to the normalisation's eps.
            rtol = 2e-2 if symmetry.kind == "scale" else 1e-8
            assert (model(x) - before).abs().max() <= rtol * before.abs().max(), symmetry
            distance = symmetry.distance()
            assert distance.shape == (symmetry.size,)
            assert 0 <= distance.min() <= distance.max() <= 1
            model.load_state_dict(state)


def test_convnext_and_its_layer_scales():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))
    found = find_symmetries(model, draw(2, 3, 64, 64))
    assert found.untraced == ()
    # Four streams and four hidden layers, through depth-wise convolutions.
    assert [s.size for s in found.of_kind("permutation")] == [8, 32, 16, 64, 24, 96, 32, 128]
    gammas = [s for s in found.of_kind("rescaling") if any("gamma" in name for name in s.parameters)]
    assert len(gammas) == 4


def test_heads_of_attention_turn_independently():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    rotations = find_symmetries(Net(), draw(2, 3, 8)).of_kind("rotation")
    assert [(s.blocks, s.units) for s in rotations] == [(2, 4), (2, 4)]
    query_key, value_out = rotations
    assert set(query_key.parameters) == {"attention.in_proj_weight", "attention.in_proj_bias"}
    assert "attention.out_proj.weight" in value_out.parameters
    # Queries are rows 0-7 and keys rows 8-15; head 1 begins at row 4 of each.
    rows = {a.power: a.index.flatten(1).tolist() for a in query_key.actions if a.name.endswith("weight")}
    assert rows == {1.0: [[0, 1, 2, 3], [4, 5, 6, 7]], -1.0: [[8, 9, 10, 11], [12, 13, 14, 15]]}

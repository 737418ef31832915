"""Small random networks built as well-known ones are: which layers, called how. Made to be fitted once.

Each maker returns a network and what it is called with. Sizes are small; kinds of layers, sharing of
weights and the way products are written are those of the originals.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WORDS, WIDTH, HEADS = 64, 32, 4
Maker = Callable[[], tuple[nn.Module, tuple[Any, ...]]]


def words(batch: int = 4, length: int = 8) -> Tensor:
    """Return random words."""
    return torch.randint(0, WORDS, (batch, length))


def attend(
    q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | float = 0.0, *, causal: bool = False
) -> Tensor:
    """Attention of several heads, written out."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1]) + bias
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -1e9)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Conv1D(nn.Module):
    """A linear layer whose weight is [inputs, outputs]."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.nf = outputs
        self.weight = nn.Parameter(0.05 * torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return x W + b."""
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class GPT2Block(nn.Module):
    """Fused queries, keys and values; GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.ModuleDict({"c_attn": Conv1D(3 * WIDTH, WIDTH), "c_proj": Conv1D(WIDTH, WIDTH)})
        self.mlp = nn.ModuleDict({"c_fc": Conv1D(4 * WIDTH, WIDTH), "c_proj": Conv1D(WIDTH, 4 * WIDTH)})

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        mixed = attend(*self.attn["c_attn"](self.ln_1(x)).split(WIDTH, dim=2), HEADS, causal=True)
        x = x + self.attn["c_proj"](mixed)
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class GPT2(nn.Module):
    """Tied embeddings, learned positions."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(WORDS, WIDTH), nn.Embedding(16, WIDTH)
        self.h, self.ln_f = nn.ModuleList(GPT2Block() for _ in range(blocks)), nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, WORDS, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits."""
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class RMS(nn.Module):
    """Normalisation by the root mean square."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return x, normalised."""
        return self.weight * x * x.pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt()


class MLP(nn.Module):
    """A gated feed-forward network."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, 2 * WIDTH, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """Stacked weights, one expert after the other with the tokens routed to it."""

    def __init__(self, count: int = 4) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(0.1 * torch.randn(count, 4 * WIDTH, WIDTH))
        self.down_proj = nn.Parameter(0.1 * torch.randn(count, WIDTH, 2 * WIDTH))

    def forward(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """Return the sum over each token's experts."""
        out = torch.zeros_like(x)
        for expert in chosen.unique():
            token, place = torch.where(chosen == expert)
            gate, up = F.linear(x[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, self.down_proj[expert]) * shares[token, place, None]
            out.index_add_(0, token, y)
        return out


class Sparse(nn.Module):
    """A mixture of experts, two a token."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(WIDTH, 4, bias=False), Experts()

    def forward(self, x: Tensor) -> Tensor:
        """Return the output."""
        flat = x.flatten(0, 1)
        shares, chosen = self.gate(flat).softmax(-1).topk(2, dim=-1)
        return self.experts(flat, chosen, shares).view_as(x)


class Batched(nn.Module):
    """All experts at once: batched products of weights [experts, inputs, outputs]."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.router, self.how = nn.Linear(WIDTH, 4), how
        self.up = nn.Parameter(0.1 * torch.randn(4, WIDTH, 2 * WIDTH))
        self.up_bias = nn.Parameter(torch.zeros(4, 2 * WIDTH))
        self.down = nn.Parameter(0.1 * torch.randn(4, 2 * WIDTH, WIDTH))
        self.down_bias = nn.Parameter(torch.zeros(4, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Return the output."""
        flat = x.flatten(0, 1)
        if self.how == "bmm":
            hidden = torch.bmm(flat.expand(4, -1, -1), self.up) + self.up_bias[:, None]
            every = torch.bmm(F.gelu(hidden), self.down) + self.down_bias[:, None]
        else:
            hidden = torch.einsum("nd,edh->enh", flat, self.up) + self.up_bias[:, None]
            every = torch.einsum("enh,ehd->end", F.gelu(hidden), self.down) + self.down_bias[:, None]
        return torch.einsum("ne,end->nd", self.router(flat).softmax(-1), every).view_as(x)


class Low(nn.Module):
    """A frozen linear layer with a pair of low rank beside it."""

    def __init__(self, base: nn.Linear, r: int = 4) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, r, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(r, base.out_features, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum."""
        return self.base_layer(x) + 2.0 * self.lora_B["default"](self.lora_A["default"](x))


class Llama(nn.Module):
    """Fewer keys than queries, gated feed-forward networks or experts."""

    def __init__(self, make: Callable[[], nn.Module] = MLP, *, low_rank: bool = False) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList()
        for _ in range(3):
            widths = {"q_proj": WIDTH, "k_proj": WIDTH // 2, "v_proj": WIDTH // 2, "o_proj": WIDTH}
            attention = nn.ModuleDict({name: nn.Linear(WIDTH, w, bias=False) for name, w in widths.items()})
            block = {"self_attn": attention, "mlp": make(), "norm": RMS(WIDTH), "post_norm": RMS(WIDTH)}
            self.layers.append(nn.ModuleDict(block))
        self.norm, self.lm_head = RMS(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        if low_rank:
            self.requires_grad_(False)
            for block in self.layers:
                for name in ("q_proj", "v_proj"):
                    block["self_attn"][name] = Low(block["self_attn"][name])

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits."""
        x = self.embed_tokens(ids)
        for block in self.layers:
            a, h = block["self_attn"], block["norm"](x)
            k, v = (
                a[name](h).unflatten(-1, (2, -1)).repeat_interleave(2, 2).flatten(2)
                for name in ("k_proj", "v_proj")
            )
            x = x + a["o_proj"](attend(a["q_proj"](h), k, v, HEADS, causal=True))
            x = x + block["mlp"](block["post_norm"](x))
        return self.lm_head(self.norm(x))


class BERT(nn.Module):
    """torch's encoder layers, a pooler and two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.kinds = (nn.Embedding(n, WIDTH) for n in (WORDS, 16, 2))
        self.norm = nn.LayerNorm(WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.1, "gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.pooler, self.next = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
        self.decoder = nn.Linear(WIDTH, WORDS)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits of words and of the next sentence."""
        x = self.norm(
            self.words(ids) + self.places(torch.arange(ids.shape[1])) + self.kinds(torch.zeros_like(ids))
        )
        x = self.encoder(x)
        return self.decoder(x), self.next(torch.tanh(self.pooler(x[:, 0])))


class T5(nn.Module):
    """Encoder and decoder that share their words; a learned bias of relative positions."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.relative_attention_bias = nn.Embedding(WORDS, WIDTH), nn.Embedding(32, HEADS)
        self.encoder, self.decoder = (nn.ModuleList(self._block(sides) for _ in range(2)) for sides in (1, 2))

    @staticmethod
    def _block(sides: int) -> nn.ModuleDict:
        parts: dict[str, nn.Module] = {}
        for name in ("self", "cross")[:sides]:
            parts[name] = nn.ModuleDict({p: nn.Linear(WIDTH, WIDTH, bias=False) for p in "qkvo"})
            parts[f"{name}_norm"] = RMS(WIDTH)
        return nn.ModuleDict(
            {**parts, "wi": nn.Linear(WIDTH, 64), "wo": nn.Linear(64, WIDTH), "norm": RMS(WIDTH)}
        )

    def _bias(self, n: int, m: int) -> Tensor:
        offset = (torch.arange(n)[:, None] - torch.arange(m)[None]).clamp(-16, 15) + 16
        return self.relative_attention_bias(offset).permute(2, 0, 1)

    def forward(self, ids: Tensor, target: Tensor) -> Tensor:
        """Return logits, by the tied embedding."""
        memory: Tensor | None = None
        for ids_of, blocks in ((ids, self.encoder), (target, self.decoder)):
            x = self.shared(ids_of)
            for block in blocks:
                for name in ("self", "cross"):
                    if name not in block:
                        continue
                    a, h = block[name], block[f"{name}_norm"](x)
                    source = h if name == "self" else memory
                    bias = self._bias(h.shape[1], h.shape[1]) if name == "self" else 0.0
                    x = x + a["o"](attend(a["q"](h), a["k"](source), a["v"](source), HEADS, bias))
                x = x + block["wo"](F.relu(block["wi"](block["norm"](x))))
            memory = x
        return F.linear(x, self.shared.weight)


class RecurrentLM(nn.Module):
    """Words, a recurrent network, words."""

    def __init__(self, kind: type[nn.RNNBase], *, tied: bool = False, **options: Any) -> None:
        super().__init__()
        self.encoder = nn.Embedding(WORDS, WIDTH)
        self.rnn = kind(WIDTH, WIDTH, batch_first=True, **options)
        self.decoder = nn.Linear(WIDTH * (2 if options.get("bidirectional") else 1), WORDS)
        if tied:
            self.decoder.weight = self.encoder.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits."""
        return self.decoder(self.rnn(self.encoder(ids))[0])


class Seq2Seq(nn.Module):
    """A packed encoder, and a cell that attends to what it put out."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.encoder = nn.Embedding(WORDS, WIDTH), nn.GRU(WIDTH, WIDTH // 2, bidirectional=True)
        self.cell, self.score = nn.GRUCell(WIDTH, WIDTH), nn.Bilinear(WIDTH, WIDTH, 1)
        self.out = nn.Linear(2 * WIDTH, WORDS)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Return logits of four steps."""
        packed = nn.utils.rnn.pack_padded_sequence(
            self.words(ids).transpose(0, 1), lengths, enforce_sorted=False
        )
        memory = nn.utils.rnn.pad_packed_sequence(self.encoder(packed)[0])[0].transpose(0, 1)
        h, logits = memory.mean(1), []
        for _ in range(4):
            scores = self.score(h[:, None].expand_as(memory).contiguous(), memory.contiguous()).softmax(1)
            seen = (scores * memory).sum(1)
            h = self.cell(seen, h)
            logits.append(self.out(torch.cat([h, seen], -1)))
        return torch.stack(logits, 1)


class Graph(nn.Module):
    """Sums over neighbours; linear layers whose widths are called channels."""

    class Linear(nn.Module):
        """Weight [outputs, inputs]."""

        def __init__(self, in_channels: int, out_channels: int, bias: bool = False) -> None:
            super().__init__()
            self.in_channels, self.out_channels = in_channels, out_channels
            self.weight = nn.Parameter(0.2 * torch.randn(out_channels, in_channels))
            self.register_parameter("bias", nn.Parameter(torch.zeros(out_channels)) if bias else None)

        def forward(self, x: Tensor) -> Tensor:
            """Return W x + b."""
            return F.linear(x, self.weight, self.bias)

    def __init__(self, *, attention: bool = False) -> None:
        super().__init__()
        widths = [8, WIDTH, WIDTH, 5]
        self.lins = nn.ModuleList(Graph.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.biases = nn.ParameterList(torch.zeros(b) for b in widths[1:])
        self.scores = nn.ParameterList(torch.randn(2, b) for b in widths[1:]) if attention else None

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        """Return the nodes' outputs."""
        for i, lin in enumerate(self.lins):
            h, weight = lin(x), torch.ones(edges.shape[1], 1)
            if self.scores is not None:
                score = (h[edges[0]] * self.scores[i][0] + h[edges[1]] * self.scores[i][1]).sum(-1)
                weight = F.leaky_relu(score, 0.2).sigmoid()[:, None]
            x = torch.zeros_like(h).index_add(0, edges[1], h[edges[0]] * weight) + self.biases[i]
            x = x.relu() if i < len(self.lins) - 1 else x
        return x


class GRN(nn.Module):
    """A gated residual network."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.skip = nn.Linear(inputs, width) if inputs != width else nn.Identity()
        self.fc1, self.fc2 = nn.Linear(inputs, width), nn.Linear(width, width)
        self.glu, self.norm = nn.Linear(width, 2 * width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output."""
        return self.norm(self.skip(x) + F.glu(self.glu(self.fc2(F.elu(self.fc1(x))))))


class TFT(nn.Module):
    """Parts of a temporal fusion transformer: variable selection, LSTM, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.ModuleList(GRN(1, WIDTH) for _ in range(3))
        self.select = GRN(3, 3)
        self.lstm, self.gate = nn.LSTM(WIDTH, WIDTH, batch_first=True), nn.Linear(WIDTH, 2 * WIDTH)
        self.attention, self.end = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), GRN(WIDTH, WIDTH)
        self.quantiles = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return quantiles of each step."""
        shares = self.select(x).softmax(-1)
        seen = (
            torch.stack([grn(x[..., i : i + 1]) for i, grn in enumerate(self.each)], -1) @ shares[..., None]
        )
        y = seen[..., 0] + F.glu(self.gate(self.lstm(seen[..., 0])[0]))
        return self.quantiles(self.end(y + self.attention(y, y, y, need_weights=False)[0]))


class UNet(nn.Module):
    """Down and up again."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.up, self.join = nn.ConvTranspose2d(16, 8, 2, stride=2), nn.Conv2d(16, 8, 3, padding=1)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of pixels."""
        a = self.down1(x).relu()
        return self.out(self.join(torch.cat([a, self.up(self.down2(a).relu())], 1)).relu())


class Recommender(nn.Module):
    """Bags of indices, their products, two perceptrons."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(50, 16, mode="sum") for _ in range(3))
        self.bottom = nn.Sequential(nn.Linear(13, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(22, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """Return logits."""
        dense = self.bottom(x)
        z = torch.stack([dense, *(bag(ids) for bag in self.bags)], 1)
        i, j = torch.tril_indices(4, 4, offset=-1)
        return self.top(torch.cat([dense, (z @ z.mT)[:, i, j]], -1))


class StateSpace(nn.Module):
    """A diagonal recurrence with weights that depend on the input, and a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj, self.out_proj = (
            nn.Linear(WIDTH, 4 * WIDTH, bias=False),
            nn.Linear(2 * WIDTH, WIDTH, bias=False),
        )
        self.conv1d = nn.Conv1d(2 * WIDTH, 2 * WIDTH, 4, groups=2 * WIDTH, padding=3)
        self.x_proj, self.dt_proj = nn.Linear(2 * WIDTH, 2 + 16, bias=False), nn.Linear(2, 2 * WIDTH)
        self.A_log, self.D = nn.Parameter(torch.randn(2 * WIDTH, 8)), nn.Parameter(torch.ones(2 * WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Return the output."""
        u, z = self.in_proj(x).chunk(2, -1)
        u = F.silu(self.conv1d(u.mT)[..., : x.shape[1]].mT)
        dt, b, c = self.x_proj(u).split([2, 8, 8], -1)
        dt, h, ys = F.softplus(self.dt_proj(dt)), torch.zeros(len(x), 2 * WIDTH, 8), []
        for t in range(x.shape[1]):
            h = (
                h * (-dt[:, t, :, None] * self.A_log.exp()).exp()
                + (dt[:, t] * u[:, t])[..., None] * b[:, t, None]
            )
            ys.append((h * c[:, t, None]).sum(-1))
        return self.out_proj((torch.stack(ys, 1) + u * self.D) * F.silu(z))


def generator() -> nn.Module:
    """Return a DCGAN's generator."""
    return nn.Sequential(
        nn.ConvTranspose2d(16, 32, 4, 1, 0, bias=False), nn.BatchNorm2d(32), nn.ReLU(True),
        nn.ConvTranspose2d(32, 16, 4, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(True),
        nn.ConvTranspose2d(16, 3, 4, 2, 1, bias=False), nn.Tanh(),
    )  # fmt: skip


def discriminator() -> nn.Module:
    """Return a DCGAN's discriminator, with spectral normalisation."""
    norm = nn.utils.parametrizations.spectral_norm
    return nn.Sequential(
        norm(nn.Conv2d(3, 16, 4, 2, 1)), nn.LeakyReLU(0.2, True), norm(nn.Conv2d(16, 32, 4, 2, 1)),
        nn.LeakyReLU(0.2, True), norm(nn.Conv2d(32, 1, 4)), nn.Flatten(),
    )  # fmt: skip


def lazy() -> nn.Module:
    """Return a network that learns its shapes from its first batch."""
    return nn.Sequential(
        nn.LazyConv2d(8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(16), nn.ReLU(), nn.LazyLinear(4)
    )


def image(size: int = 16, batch: int = 4, channels: int = 3) -> Tensor:
    """Return random images."""
    return torch.randn(batch, channels, size, size)


OWN: dict[str, Maker] = {
    "GPT-2": lambda: (GPT2(), (words(),)),
    "BERT": lambda: (BERT(), (words(),)),
    "T5": lambda: (T5(), (words(), words())),
    "Llama": lambda: (Llama(), (words(),)),
    "Llama with LoRA": lambda: (Llama(low_rank=True), (words(),)),
    "Mixtral": lambda: (Llama(Sparse), (words(),)),
    "experts by bmm": lambda: (Llama(lambda: Batched("bmm")), (words(),)),
    "experts by einsum": lambda: (Llama(lambda: Batched("einsum")), (words(),)),
    "Mamba": lambda: (
        nn.Sequential(nn.Embedding(WORDS, WIDTH), StateSpace(), nn.Linear(WIDTH, WORDS)), (words(),),
    ),
    "LSTM language model": lambda: (RecurrentLM(nn.LSTM, num_layers=2, dropout=0.2), (words(),)),
    "tied GRU language model": lambda: (RecurrentLM(nn.GRU, tied=True), (words(),)),
    "bidirectional RNN": lambda: (RecurrentLM(nn.RNN, bidirectional=True), (words(),)),
    "sequence to sequence": lambda: (Seq2Seq(), (words(), torch.tensor([8, 3, 5, 6]))),
    "graph network": lambda: (Graph(), (torch.randn(20, 8), torch.randint(0, 20, (2, 60)))),
    "graph attention": lambda: (Graph(attention=True), (torch.randn(20, 8), torch.randint(0, 20, (2, 60)))),
    "temporal fusion transformer": lambda: (TFT(), (torch.randn(4, 6, 3),)),
    "DCGAN generator": lambda: (generator(), (torch.randn(4, 16, 1, 1),)),
    "DCGAN discriminator": lambda: (discriminator(), (image(16),)),
    "U-Net": lambda: (UNet(), (image(),)),
    "recommender": lambda: (Recommender(), (torch.randn(8, 13), torch.randint(0, 50, (8, 5)))),
    "lazy convolutional network": lambda: (lazy(), (image(8),)),
    "torch's Transformer": lambda: (
        nn.Transformer(WIDTH, HEADS, 2, 2, 64, batch_first=True),
        (torch.randn(4, 6, WIDTH), torch.randn(4, 5, WIDTH)),
    ),
}  # fmt: skip

#: timm's networks: the arguments that make them small, and the size of their images.
TIMM: dict[str, tuple[dict[str, Any], int]] = {
    "resnet18": ({}, 32),
    "resnet50": ({"layers": (1, 1, 1, 1)}, 32),
    "resnetv2_18": ({}, 32),
    "nf_regnet_b0": ({}, 32),
    "regnetx_002": ({}, 32),
    "densenet121": ({"block_config": (2, 2, 2, 2)}, 32),
    "mobilenetv3_small_050": ({}, 32),
    "tf_efficientnet_b0": ({}, 32),
    "convnext_atto": ({}, 32),
    "vit_tiny_patch16_224": ({"img_size": 32, "depth": 3}, 32),
    "beit_base_patch16_224": ({"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 4}, 32),
    "eva02_tiny_patch14_224": ({"img_size": 28, "depth": 2}, 28),
    "swin_tiny_patch4_window7_224": ({"img_size": 56, "embed_dim": 24, "depths": (1, 1, 1, 1)}, 56),
    "swinv2_tiny_window8_256": (
        {"img_size": 64, "embed_dim": 24, "depths": (1, 1, 1, 1), "window_size": 2},
        64,
    ),
    "cait_xxs24_224": ({"img_size": 32, "depth": 2}, 32),
    "xcit_nano_12_p16_224": ({"img_size": 32, "depth": 2}, 32),
    "mixer_s32_224": ({"img_size": 32}, 32),
    "gmlp_ti16_224": ({"img_size": 32}, 32),
    "pvt_v2_b0": ({}, 32),
    "levit_128s": ({"img_size": 64}, 64),
    "mobilevit_xxs": ({}, 64),
    "visformer_tiny": ({"img_size": 64}, 64),
}

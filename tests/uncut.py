"""Batches that cannot be cut, of many kinds, each with the plain loss of the whole batch; and sane models, whose batches may be cut."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orograph import Objective
from orograph.criteria import as_criterion
from orograph.nesting import map_tensors
from orograph.products.likelihood import _uniforms

from .networks import TokenModel, small_mlp

D = torch.float64
CE, MSE = nn.CrossEntropyLoss(), nn.MSELoss()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=D)


def labels(classes: int, *shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, classes, shape, generator=seeded(seed))


def built(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().to(D)


class By(nn.Module):
    """Members and how they are put together."""

    def __init__(self, run: Callable[..., Any], **members: Any) -> None:
        super().__init__()
        for name, member in members.items():
            setattr(self, name, member)
        self.run = run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


@dataclass
class Uncut:
    """One batch, and what is defined for it."""

    make: Callable[[], nn.Module]
    criterion: Any
    batch: Any
    forward: Any = None
    fisher: tuple[str, ...] = ("mc", "empirical")
    curved: bool = True  # a GGN is defined: the output is one tensor
    divisible: bool = False
    twin: Callable[[], nn.Module] | None = None  # the same function in operations that plain torch differentiates twice
    settings: dict[str, Any] = field(default_factory=dict)

    def objective(self, **settings: Any) -> Objective:
        return Objective(built(self.make), self.criterion, [self.batch], forward=self.forward, **(self.settings | settings))

    def plain(self) -> tuple[nn.Module, Tensor | Any, Any]:
        """(model, output, target) by plain torch on the whole batch."""
        model = built(self.twin or self.make).eval()
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            output, target = self.forward(model, self.batch) if self.forward else (model(self.batch[0]), self.batch[1])
        return model, output, target


def as_single(case: Uncut, dtype: torch.dtype) -> Objective:
    """The case as a model and data of another precision."""
    lower = lambda t: t.to(dtype) if t.is_floating_point() else t
    return Objective(built(case.make).to(dtype), case.criterion, [map_tensors(lower, case.batch)], forward=case.forward, dtype=dtype)


# references on the whole batch


def rows_of(values: Tensor, parameters: list[nn.Parameter], *, graph: bool = False) -> Tensor:
    """Derivative of every entry of `values` in all parameters (entries, n)."""
    found = []
    for value in values.reshape(-1):
        if not value.requires_grad:
            found.append(torch.zeros(sum(p.numel() for p in parameters), dtype=D))
            continue
        parts = torch.autograd.grad(value, parameters, retain_graph=True, create_graph=graph, allow_unused=True, materialize_grads=True)
        found.append(torch.cat([part.reshape(-1) for part in parts]))
    return torch.stack(found)


def dense(case: Uncut, matrix: str) -> Tensor:
    """The Hessian, GGN or a Fisher of the case (n, n)."""
    model, output, target = case.plain()
    parameters = [p for p in model.parameters() if p.requires_grad]
    if matrix == "value":
        return case.criterion(output, target).detach()
    if matrix == "hessian":
        return rows_of(rows_of(case.criterion(output, target), parameters, graph=True), parameters)
    J = rows_of(output, parameters)
    leaf = output.detach().clone().requires_grad_()
    if matrix == "ggn":
        C = torch.autograd.functional.hessian(lambda out: case.criterion(out, target), leaf.detach()).reshape(leaf.numel(), -1)
        return J.T @ C @ J
    scores = mc_scores(case, leaf, target) if matrix == "mc" else empirical_scores(case, leaf, target)
    return (scores @ J).T @ (scores @ J)


def empirical_scores(case: Uncut, leaf: Tensor, target: Tensor) -> Tensor:
    """sqrt(weight / units) * gradient in the outputs of every unit's loss (units, outputs)."""
    each = as_criterion(case.criterion, nn.Module(), None, None).each(leaf, target)
    units = each.reshape(-1)
    if isinstance(case.criterion, nn.MSELoss):  # the negative log-likelihood of an example is the sum over its row
        each = each.reshape(len(each), -1).sum(1) if each.ndim else each.reshape(1)
    scores = [torch.autograd.grad(one, leaf, retain_graph=True)[0].reshape(-1) for one in each.reshape(-1)]
    return torch.stack(scores) / weight(case, units)


def mc_scores(case: Uncut, leaf: Tensor, target: Tensor) -> Tensor:
    """The same at labels drawn from the model."""
    objective = case.objective()
    with objective.applied():
        term = next(iter(objective.terms()))
        out = term.output().detach()
        axis = 1 if out.ndim > 1 else 0
        shape = out.shape if isinstance(case.criterion, nn.MSELoss) else out.movedim(axis, -1).shape[:-1]
        uniform = _uniforms(0, term, shape, out)
    if isinstance(case.criterion, nn.MSELoss):
        drawn = leaf.detach() + torch.special.ndtri(uniform) / 2**0.5
        each = ((drawn - leaf) ** 2).reshape(-1)
    else:
        drawn = (leaf.detach().movedim(axis, -1).softmax(-1).cumsum(-1) < uniform[..., None]).sum(-1)
        each = F.cross_entropy(leaf, drawn, reduction="none").reshape(-1)
    return torch.stack([torch.autograd.grad(one, leaf, retain_graph=True)[0].reshape(-1) for one in each]) / weight(case, each)


def weight(case: Uncut, units: Tensor) -> float:
    """Root of what the sum over units is divided by."""
    return 1.0 if getattr(case.criterion, "reduction", "mean") == "sum" else len(units) ** 0.5


# models and batches


X, Y = normal(9, 4), labels(3, 9)
GRAPH = (torch.rand(9, 9, generator=seeded(2)) < 0.3).to(D)
GRAPH = ((GRAPH + GRAPH.T + torch.eye(9, dtype=D)) > 0).to(D)
GRAPH = GRAPH / GRAPH.sum(1, keepdim=True)
EDGES = (GRAPH > 0).nonzero().T


def gnn() -> nn.Module:
    return By(lambda m, x, A: m.b(A @ torch.tanh(A @ m.a(x))), a=nn.Linear(4, 5), b=nn.Linear(5, 3))


def spread(h: Tensor, edges: Tensor) -> Tensor:
    return torch.zeros_like(h).index_add(0, edges[0], h[edges[1]]) / 3


def edge_gnn() -> nn.Module:
    return By(lambda m, x, edges: m.b(spread(torch.tanh(m.a(spread(x, edges))), edges)), a=nn.Linear(4, 5), b=nn.Linear(5, 3))


def pooled_gnn() -> nn.Module:
    def run(m: Any, x: Tensor, edges: Tensor, member: Tensor) -> Tensor:
        h = torch.tanh(m.a(spread(x, edges)))
        return m.b(h.new_zeros(int(member.max()) + 1, h.shape[1]).index_add(0, member, h))

    return By(run, a=nn.Linear(4, 5), b=nn.Linear(5, 3))


def on_top(coupling: Callable[[Tensor], Tensor], **members: Any) -> Callable[[], nn.Module]:
    """A small network with `coupling` of the hidden rows of a batch."""
    return lambda: By(lambda m, x: m.b(coupling(torch.tanh(m.a(x)))), a=nn.Linear(4, 5), b=nn.Linear(5, 3), **members)


def tail(h: Tensor) -> Tensor:
    """The last two rows of a batch of nine see one another."""
    return torch.cat([h[:-2], h[-2:] + h[-2:].flip(0)]) if len(h) > 1 else h


def late(h: Tensor) -> Tensor:
    """Rows from the sixth on share their mean."""
    return torch.cat([h[:5], h[5:] - h[5:].mean(0)]) if len(h) > 5 else h


def clip() -> nn.Module:
    return By(lambda m, x, z: (F.normalize(m.a(x), dim=1), F.normalize(m.b(z), dim=1), m.scale.exp()), a=nn.Linear(4, 3), b=nn.Linear(5, 3), scale=nn.Parameter(torch.tensor(0.7)))


def contrastive(out: tuple[Tensor, Tensor, Tensor], _: Any = None) -> Tensor:
    logits = out[2] * out[0] @ out[1].T
    both = torch.arange(len(logits))
    return (F.cross_entropy(logits, both) + F.cross_entropy(logits.T, both)) / 2


def ranking(out: Tensor, target: Tensor) -> Tensor:
    first, second = torch.triu_indices(len(out), len(out), 1)
    return F.softplus(-(out[first, 0] - out[second, 0]) * (target[first] - target[second]).sign()).mean()


def recurrent(kind: type, last: bool) -> Callable[[], nn.Module]:
    return lambda: By(lambda m, x: m.b(m.a(x)[0][-1] if last else m.a(x)[0]), a=kind(4, 3), b=nn.Linear(3, 3))


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0)


def sequences() -> list[Tensor]:
    return [normal(length, 4, seed=length) for length in (5, 3, 6, 2)]


def compressed(matrix: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls CSR a beta
        return matrix.to_sparse_csr()


def strided(parts: list[Tensor]) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls nested tensors a prototype
        return torch.nested.nested_tensor(parts)


def pooled() -> nn.Module:
    return By(lambda m, many: m.b(torch.stack([torch.tanh(m.a(one)).mean(0) for one in many])), a=nn.Linear(4, 5), b=nn.Linear(5, 3))


def offset_pooled() -> nn.Module:
    def run(m: Any, values: Tensor, offsets: Tensor) -> Tensor:
        return m.b(torch.stack([part.mean(0) for part in torch.tanh(m.a(values)).tensor_split(offsets[1:])]))

    return By(run, a=nn.Linear(4, 5), b=nn.Linear(5, 3))


def packed() -> nn.utils.rnn.PackedSequence:
    return nn.utils.rnn.pack_sequence(sequences(), enforce_sorted=False)


def embedding(sparse: bool) -> Callable[[], nn.Module]:
    return lambda: By(lambda m, x: m.b(torch.tanh(m.a(x).mean(1))), a=nn.Embedding(7, 4, sparse=sparse), b=nn.Linear(4, 3))


def functional_embedding(sparse: bool) -> Callable[[], nn.Module]:
    return lambda: By(lambda m, x: m.b(torch.tanh(F.embedding(x, m.a, sparse=sparse).mean(1))), a=nn.Parameter(normal(7, 4)), b=nn.Linear(4, 3))


def gated() -> nn.Module:
    return By(lambda m, x: m.b(torch.tanh(m.a(x)) + m.gate * m.a(x).mean(0)), a=nn.Linear(4, 5), b=nn.Linear(5, 3), gate=nn.Parameter(torch.zeros(())))


def from_the_end() -> nn.Module:
    """Positions are counted from the end of the longest sequence of the batch."""

    def run(m: Any, tokens: Tensor, lengths: Tensor) -> Tensor:
        longest = int(lengths.max())
        keep = torch.arange(longest) < lengths[:, None]
        h = torch.tanh(m.a(tokens[:, :longest]) + m.place.weight[:longest].flip(0)) * keep[..., None]
        return m.b(h.sum(1))

    return By(run, a=nn.Embedding(7, 5), place=nn.Embedding(6, 5), b=nn.Linear(5, 3))


@dataclass(frozen=True)
class GraphBatch:
    nodes: Tensor
    edges: Tensor
    classes: Tensor
    train: Tensor
    name: str = "karate"


def encoding(values: dict[str, Tensor], *, output: bool = False) -> Any:
    from transformers import BatchEncoding
    from transformers.modeling_outputs import BaseModelOutput

    return BaseModelOutput(last_hidden_state=values["x"]) if output else BatchEncoding(values)


TOKENS = labels(7, 5, 6)
PAIRS = lambda m, b: (m(b["x"], b["z"]), b["z"])
ON_GRAPH = lambda m, b: (m(b["x"], b["A"]), b["y"])
COUPLED = {
    "centring": on_top(lambda h: h - h.mean(0)),
    "statistics by hand": on_top(lambda h: (h - h.mean(0)) / (h.std(0) + 0.1)),
    "in-batch softmax": on_top(lambda h: h * h.softmax(0) * 5),
    "attention over the batch": on_top(lambda h: h + (h @ h.T).softmax(1) @ h),
    "cumulative sum": on_top(lambda h: h.cumsum(0) / 4),
    "tiny centring": on_top(lambda h: h - 1e-8 * h.mean(0)),
    "largest of the batch": on_top(lambda h: h / h.abs().max()),
    "last two rows": on_top(tail),
    "later rows": on_top(late),
    "gate of zero": gated,
    "BatchNorm without running statistics": lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Tanh(), nn.Linear(5, 3)),
    "InstanceNorm of an unbatched input": lambda: By(lambda m, x: m.b(m.n(m.a(x).T).T), a=nn.Linear(4, 5), n=nn.InstanceNorm1d(5), b=nn.Linear(5, 3)),
}


def cases() -> dict[str, Uncut]:
    """Every kind by its name."""
    found = {f"coupled rows: {name}": Uncut(make, CE, (X, Y)) for name, make in COUPLED.items()}
    found |= {f"coupled rows, regression: {name}": Uncut(COUPLED[name], MSE, (X, normal(9, 3, seed=5))) for name in ("centring", "in-batch softmax")}
    found["coupled rows: sum"] = Uncut(COUPLED["centring"], nn.CrossEntropyLoss(reduction="sum"), (X, Y))
    found |= by_structure() | by_axes() | by_criterion()
    return found


def by_structure() -> dict[str, Uncut]:
    """The data hang together: graphs, flattened targets, sequences of different lengths."""
    ragged, four = sequences(), labels(3, 4)
    flat = lambda m, b: (m(b["x"]).reshape(-1, 7), b["y"])
    found = {
        "flattened targets": Uncut(TokenModel, CE, {"x": TOKENS, "y": labels(7, 30)}, flat),
        "flattened targets, pair": Uncut(lambda: By(lambda m, x: m.a(x).flatten(0, 1), a=TokenModel()), CE, (TOKENS, labels(7, 30))),
        "targets as a grid of another order": Uncut(TokenModel, CE, {"x": TOKENS, "y": labels(7, 6, 5)}, lambda m, b: (m(b["x"]).transpose(0, 1).reshape(30, 7), b["y"].flatten())),
        "dense graph": Uncut(gnn, CE, {"x": X, "A": GRAPH, "y": Y}, ON_GRAPH),
        "sparse graph, COO": Uncut(gnn, CE, {"x": X, "A": GRAPH.to_sparse(), "y": Y}, ON_GRAPH),
        "sparse graph, CSR": Uncut(gnn, CE, {"x": X, "A": compressed(GRAPH), "y": Y}, ON_GRAPH),
        "edges": Uncut(edge_gnn, CE, {"x": X, "e": EDGES, "y": Y}, lambda m, b: (m(b["x"], b["e"]), b["y"])),
        "edges, as pair": Uncut(lambda: By(lambda m, x: m.a(*x), a=edge_gnn()), CE, ((X, EDGES), Y)),
        "edges, training mask": Uncut(edge_gnn, CE, GraphBatch(X, EDGES, Y, torch.arange(9) % 2 == 0), lambda m, b: (m(b.nodes, b.edges)[b.train], b.classes[b.train])),
        "graphs of a batch": Uncut(pooled_gnn, CE, {"x": X, "e": EDGES, "member": torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2]), "y": Y[:3]}, lambda m, b: (m(b["x"], b["e"], b["member"]), b["y"])),
        "list of sequences": Uncut(pooled, CE, (ragged, four)),
        "tuple of sequences": Uncut(pooled, CE, (tuple(ragged), four)),
        "nested tensor": Uncut(lambda: By(lambda m, x: m.a(x.unbind()), a=pooled()), CE, (strided(ragged), four)),
        "nested tensor, jagged": Uncut(lambda: By(lambda m, x: m.a(x.unbind()), a=pooled()), CE, (torch.nested.nested_tensor(ragged, layout=torch.jagged), four)),
        "values and offsets": Uncut(offset_pooled, CE, {"v": torch.cat(ragged), "o": torch.tensor([0, 5, 8, 14]), "y": four}, lambda m, b: (m(b["v"], b["o"]), b["y"])),
        "packed sequence": Uncut(lambda: By(lambda m, x: m.b(m.a(x)[1][0][0]), a=nn.LSTM(4, 3), b=nn.Linear(3, 3)), CE, (packed(), four), divisible=True),  # all of it runs for every part, whose rows are then taken
        "packed sequence, every step": Uncut(lambda: By(lambda m, x: m.b(m.a(x)[0].data), a=nn.GRU(4, 3), b=nn.Linear(3, 3)), CE, (packed(), labels(3, 16))),
        "encoding with an adjacency": Uncut(gnn, CE, encoding({"x": X, "A": GRAPH, "y": Y}), lambda m, b: (m(b["x"], b["A"]), b.y)),
        "model output": Uncut(COUPLED["centring"], CE, (encoding({"x": X}, output=True), Y), lambda m, b: (m(b[0].last_hidden_state), b[1])),
        "shared mask and words": Uncut(lambda: By(lambda m, x, keep: m.b(torch.tanh(m.a(x)) - (torch.tanh(m.a(x)) * keep[:, None]).mean(0)), a=nn.Linear(4, 5), b=nn.Linear(5, 3)), CE,
                                       {"x": X, "keep": torch.arange(9) < 4, "y": Y, "name": "all", "epoch": 3, "note": None}, lambda m, b: (m(b["x"], b["keep"]), b["y"])),
        "position from the end": Uncut(from_the_end, CE, {"t": labels(7, 8, 6), "n": torch.tensor([6, 2, 4, 3, 5, 1, 3, 2]), "y": labels(3, 8)}, lambda m, b: (m(b["t"], b["n"]), b["y"])),
    }  # fmt: skip
    return found


def by_axes() -> dict[str, Uncut]:
    """No axis, or another one than the first, counts examples; parameters without axes; gradients that are sparse."""
    sequence = normal(6, 3, 4)
    scalar = lambda: By(lambda m, x: (m.net(x) * m.scale.exp()).mean(), net=small_mlp(4, 5, 1), scale=nn.Parameter(torch.tensor(0.3)))
    cloud = lambda: By(lambda m, x: m.b(torch.tanh(m.a(x)).amax(0)), a=nn.Linear(3, 6), b=nn.Linear(6, 3))
    found = {
        f"time first: {kind.__name__}{', last step' if last else ''}": Uncut(recurrent(kind, last), CE if last else MSE, (sequence, labels(3, 3) if last else normal(6, 3, 3, seed=3)))
        for kind in (nn.RNN, nn.GRU, nn.LSTM)
        for last in (False, True)
    }
    return found | {
        "time first: transformer": Uncut(encoder, MSE, (sequence, normal(6, 3, 4, seed=3))),
        "time first: square": Uncut(recurrent(nn.LSTM, True), CE, (normal(3, 3, 4), labels(3, 3))),
        "an unbatched sequence": Uncut(encoder, MSE, (normal(6, 4), normal(6, 4, seed=3))),
        "one point cloud": Uncut(cloud, CE, (normal(9, 3), torch.tensor(2))),
        "one point cloud, regression": Uncut(cloud, MSE, (normal(9, 3), normal(3, seed=2))),
        "one target for all": Uncut(scalar, MSE, (X, torch.tensor(1.5, dtype=D))),
        "a number as target": Uncut(scalar, lambda out, t: (out - t) ** 2, (X, 1.5), fisher=()),
        "no target": Uncut(scalar, lambda out, t: out**2, (X, None), fisher=()),
        "sparse embedding": Uncut(embedding(True), CE, (labels(7, 9, 4), Y), divisible=True, twin=embedding(False)),
        "sparse embedding, functional": Uncut(functional_embedding(True), CE, (labels(7, 9, 4), Y), divisible=True, twin=functional_embedding(False)),
        "parameter without axes": Uncut(lambda: By(lambda m, x: m.net(x) * m.scale.exp(), net=small_mlp(), scale=nn.Parameter(torch.tensor(0.3))), CE, (X, Y), divisible=True),
        "a single number is all there is": Uncut(lambda: By(lambda m, x: x * m.scale.exp(), scale=nn.Parameter(torch.tensor(0.3))), MSE, (X, X.tanh()), divisible=True),
        "complex inputs": Uncut(lambda: By(lambda m, x: m.b(torch.tanh(torch.view_as_real(x * m.scale).flatten(1))), scale=nn.Parameter(torch.tensor([1.1, 0.4])), b=nn.Linear(4, 3)), CE,
                                (torch.complex(normal(9, 2), normal(9, 2, seed=1)), Y), divisible=True),
        "one example": Uncut(small_mlp, CE, (X[:1], Y[:1]), divisible=True),
    }  # fmt: skip


def by_criterion() -> dict[str, Uncut]:
    """The loss compares examples."""
    other = normal(9, 5, seed=4)
    scores = lambda: By(lambda m, x, z: (lambda a, b, s: s * a @ b.T)(*m.net(x, z)), net=clip())
    return {
        "CLIP": Uncut(clip, contrastive, {"x": X, "z": other}, PAIRS, fisher=(), curved=False),
        "CLIP, logits as output": Uncut(scores, CE, {"x": X, "z": other, "y": torch.arange(9)}, lambda m, b: (m(b["x"], b["z"]), b["y"])),
        "CLIP, labels made on the way": Uncut(scores, CE, {"x": X, "z": other}, lambda m, b: (m(b["x"], b["z"]), torch.arange(len(b["x"])))),
        "triplet": Uncut(small_mlp, lambda out, _: F.triplet_margin_loss(out[:3], out[3:6], out[6:]), (X, Y), fisher=()),
        "a list as output": Uncut(lambda: By(lambda m, x: [m.net(row) for row in x], net=small_mlp()), lambda out, t: F.cross_entropy(torch.stack(out), t) + out[0].sum(), (X, Y), fisher=(), curved=False),
        "ranking": Uncut(small_mlp, ranking, (X, normal(9, seed=3)), fisher=()),
        "variance across the batch": Uncut(small_mlp, lambda out, t: F.cross_entropy(out, t) + out.var(0).sum(), (X, Y), fisher=()),
        "quantile": Uncut(small_mlp, lambda out, t: torch.logsumexp(3 * F.cross_entropy(out, t, reduction="none"), 0), (X, Y), fisher=()),
        "sum that is not said": Uncut(small_mlp, lambda out, t: F.cross_entropy(out, t, reduction="sum"), (X, Y), fisher=()),
        "mean over other units": Uncut(small_mlp, lambda out, t: (F.cross_entropy(out, t, reduction="none") * (t > 0)).sum() / (t > 0).sum(), (X, Y), fisher=()),
    }


# models and losses whose batches may be cut, however near to the limits of rounding they are


class Rounding(nn.Module):
    """Works in another precision inside."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.a, self.b, self.dtype = nn.Linear(4, 33), nn.Linear(33, 3), dtype

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).to(self.dtype).tanh()
        return self.b((h @ h.new_ones(33, 33).div(33)).to(x.dtype))


def residual(depth: int) -> nn.Module:
    return By(lambda m, x: m.head(functools.reduce(lambda h, layer: h + 2 * torch.relu(layer(h)), m.layers, m.stem(x))),
              stem=nn.Linear(4, 16), layers=nn.ModuleList(nn.Linear(16, 16) for _ in range(depth)), head=nn.Linear(16, 3))  # fmt: skip


def experts() -> nn.Module:
    """The best of four experts for every example."""

    def run(m: Any, x: Tensor) -> Tensor:
        gates = m.gate(x).softmax(1)
        best = gates.argmax(1)
        return torch.stack([gates[i, e] * m.experts[int(e)](x[i]) for i, e in enumerate(best)])

    return By(run, gate=nn.Linear(4, 4), experts=nn.ModuleList(nn.Linear(4, 3) for _ in range(4)))


def trimmed() -> nn.Module:
    """Padding beyond the longest sequence of the batch is cut away."""
    return By(lambda m, x: m.b(torch.tanh(m.a(x[:, : int((x > 0).sum(1).max())])).cumsum(1)).movedim(-1, 1), a=nn.Embedding(7, 4, padding_idx=0), b=nn.Linear(4, 7))


def trimmed_batch() -> dict[str, Tensor]:
    lengths = torch.tensor([6, 2, 4, 3, 5, 1, 3, 2])
    inside = torch.arange(6) < lengths[:, None]
    return {"x": torch.where(inside, labels(6, 8, 6) + 1, 0), "y": torch.where(inside, labels(7, 8, 6), -100)}


def sane() -> dict[str, Uncut]:
    """One batch each."""
    wide, image = normal(64, 4), normal(9, 1, 8, 8)
    plain = {
        "MLP": small_mlp,
        "deep residual network": lambda: residual(40),
        "very deep residual network": lambda: residual(150),
        "LayerNorm": lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3)),
        "BatchNorm with running statistics": lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.GELU(), nn.Linear(6, 3)),
        "large weights": lambda: nn.Sequential(Scale(1e4), *small_mlp(), Scale(1e6)),
        "small outputs": lambda: nn.Sequential(*small_mlp(), Scale(1e-12)),
        "cancelling outputs": lambda: By(lambda m, x: (m.a(x) + 1e6) - 1e6, a=small_mlp()),
        "masked logits": lambda: By(lambda m, x: m.a(x) + torch.tensor([0.0, 0.0, -1e9]), a=small_mlp()),
        "forbidden logits": lambda: By(lambda m, x: m.a(x).masked_fill(torch.tensor([False, False, True]), -torch.inf), a=small_mlp()),
        "best expert": experts,
        "float32 inside": lambda: Rounding(torch.float32),
        "bfloat16 inside": lambda: Rounding(torch.bfloat16),
        "constants in float32": lambda: By(lambda m, x: m.b((m.a(x) * torch.linspace(0, 1, 5)).tanh()), a=nn.Linear(4, 5), b=nn.Linear(5, 3)),
        "weight norm": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)),
        "all zero": lambda: zeroed(small_mlp()),
        "iterated to a fixed point": lambda: By(lambda m, x: m.b(functools.reduce(lambda h, _: torch.tanh(0.5 * m.r(h) + m.a(x)), range(60), m.a(x))), a=nn.Linear(4, 5), r=nn.Linear(5, 5), b=nn.Linear(5, 3)),
    }  # fmt: skip
    found = {name: Uncut(make, CE, (wide, labels(2, 64)), divisible=True) for name, make in plain.items()}
    convolutional = lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    last = lambda m, b: (m.b(m.a(b[0])[0][:, -1]), b[1])
    encoder = lambda: nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
    mask = torch.arange(6) >= torch.randint(1, 7, (9, 1), generator=seeded(5))
    found |= {
        "convolutions": Uncut(convolutional, CE, (image, Y)),
        "LSTM": Uncut(lambda: By(None, a=nn.LSTM(4, 5, batch_first=True), b=nn.Linear(5, 3)), CE, (normal(9, 6, 4), Y), last),
        "LSTM, as many steps as examples": Uncut(lambda: By(None, a=nn.LSTM(4, 5, batch_first=True), b=nn.Linear(5, 3)), CE, (normal(9, 9, 4), Y), last),
        "transformer with padding": Uncut(encoder, MSE, {"x": normal(9, 6, 4), "mask": mask, "y": normal(9, 6, 4, seed=1)}, lambda m, b: (m(b["x"], src_key_padding_mask=b["mask"]), b["y"])),
        "tokens, some ignored": Uncut(TokenModel, CE, {"x": TOKENS, "y": labels(7, 5, 6).masked_fill(labels(2, 5, 6) > 0, -100)}, lambda m, b: (m(b["x"]).movedim(-1, 1), b["y"])),
        "targets flattened on the way": Uncut(TokenModel, CE, {"x": TOKENS, "y": labels(7, 5, 6)}, lambda m, b: (m(b["x"]).flatten(0, 1), b["y"].flatten())),
        "time first inside": Uncut(TokenModel, CE, {"x": TOKENS, "y": labels(7, 5, 6)}, lambda m, b: (m(b["x"]).transpose(0, 1).flatten(0, 1), b["y"].T.flatten())),
        "time first inside, square": Uncut(TokenModel, CE, {"x": labels(7, 6, 6), "y": labels(7, 6, 6)}, lambda m, b: (m(b["x"]).permute(1, 2, 0), b["y"].T)),
        "trimmed padding": Uncut(trimmed, CE, trimmed_batch(), lambda m, b: (lambda out: (out, b["y"][:, : out.shape[2]]))(m(b["x"]))),
        "a graph for every example": Uncut(gnn, CE, {"x": normal(7, 9, 4), "A": GRAPH.expand(7, 9, 9).clone(), "y": labels(3, 7, 9)}, lambda m, b: (m(b["x"], b["A"]).movedim(-1, 1), b["y"])),
        "a set for every example": Uncut(lambda: By(lambda m, x: m.b(torch.tanh(m.a(x)).amax(1)), a=nn.Linear(3, 6), b=nn.Linear(6, 3)), CE, (normal(9, 5, 3), Y)),
        "perfect fit": Uncut(small_mlp, MSE, (wide, small_mlp()(wide).detach())),
        "own loss": Uncut(small_mlp, lambda out, t: torch.logsumexp(out, 1).mean() - out.gather(1, t[:, None]).mean(), (wide, labels(3, 64))),
        "own loss with a penalty": Uncut(small_mlp, lambda out, t: F.cross_entropy(out, t) + 1e-3 * out.square().sum(1).mean(), (wide, labels(3, 64))),
        "sum": Uncut(small_mlp, nn.CrossEntropyLoss(reduction="sum"), (wide, labels(3, 64))),
        "class weights": Uncut(small_mlp, nn.CrossEntropyLoss(weight=torch.tensor([0.1, 1.0, 9.0], dtype=D)), (wide, labels(3, 64))),
        "a shared scalar": Uncut(small_mlp, CE, {"x": wide, "t": torch.tensor([2.0], dtype=D), "y": labels(3, 64)}, lambda m, b: (m(b["x"]) / b["t"], b["y"])),
        "a shared table": Uncut(small_mlp, CE, {"x": wide, "t": normal(3), "y": labels(3, 64)}, lambda m, b: (m(b["x"]) + b["t"], b["y"])),
        "two examples": Uncut(small_mlp, CE, (wide[:2], labels(3, 2))),
        "sparse inputs": Uncut(small_mlp, CE, (wide.relu().to_sparse(), labels(3, 64))),
        "an index for every example": Uncut(lambda: nn.Sequential(nn.Embedding(7, 3)), CE, (labels(7, 9), Y)),
    }  # fmt: skip
    return found


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def zeroed(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model

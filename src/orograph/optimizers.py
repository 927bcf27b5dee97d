r"""The edge of stability of a torch optimiser, and its preconditioner, read from its live settings and state.

Near a minimum with Hessian H every supported optimiser is a linear recurrence. Coordinate i stands at its edge at the curvature
$e_i = p_i c_i (1 - \eta_i d_i / 2) / \eta_i - w_i$: $p$ divides the gradient (1 for SGD, $\sqrt v + \epsilon$ for RMSprop), $c$ comes
from the momentum, $\eta$ is the learning rate, $d$ decoupled and $w$ coupled weight decay. The whole is stable iff $H < \mathrm{diag}(e)$.
The proof for unequal settings: where a mode $x$ has multiplier z, $x^* Q(z) x = 0$ is a real quadratic in z, whose roots leave the unit
disc at z = -1 only, where $Q(-1) = \mathrm{diag}(e) - H$ up to a positive diagonal. So $P = \mathrm{diag}(e)$ / threshold, and one
threshold on $\lambda_{max}(P^{-1} H)$ holds for all groups. It needs H > 0; directions of negative curvature grow at any learning rate.
Cohen et al. 2021, arXiv:2103.00065; 2022, arXiv:2207.14484.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import NAdam, Optimizer

from .checks import checked
from .objective import Objective

Group = Mapping[str, Any]  # one of optimizer.param_groups
State = Mapping[str, Any]  # optimizer.state of one parameter
REGIME = "full batch, P held fixed, positive curvature; noise of mini-batches makes training unstable below this edge"


@checked
@dataclass(frozen=True)
class Edge:
    """Where an optimiser turns unstable: at `lambda_max(P^-1 H) = threshold`, with P from `preconditioner`.

    `rate`: the learning rate in it, the largest of all groups · `formula` of the threshold · `regime` in which it holds.
    """

    threshold: float
    rate: float
    formula: str
    regime: str = REGIME


@dataclass(frozen=True)
class Motion:
    """How the parameters of one group move while their P stands still. `fixed`: what must be the same in all groups."""

    rate: float
    factor: float  # threshold times rate without decay: 2 for gradient descent
    formula: str  # of the factor
    decoupled: float = 0.0
    coupled: float = 0.0
    fixed: tuple[Any, ...] = ()

    @property
    def edge(self) -> float:
        """Curvature in units of p at which it turns unstable, before coupled decay."""
        return self.factor * (1 - self.rate * self.decoupled / 2) / self.rate


@dataclass(frozen=True)
class Limits:
    r"""What every coordinate (n,) bears, in the order of theta.

    The optimiser is stable iff $H + \mathrm{diag}(decay) < \mathrm{diag}(curvature)$. All of `curvature` is proportional to one over
    the learning rate and nothing else is, so $\lambda_{max}$ of $B^{-1/2} (H + D) B^{-1/2}$ is the learning rate over the largest stable one.
    """

    curvature: Tensor  # B = p c / lr
    decay: Tensor  # D: coupled decay, and p c / 2 times decoupled decay
    divisor: Tensor  # p
    least: Tensor  # eps, by which it divides where there never was a gradient; 0 for SGD
    steps: float  # of the parameter with the fewest; inf for optimisers that remember nothing


@dataclass(frozen=True)
class Rule:
    """One kind of optimiser: its motion, and p, by which it divides the gradient; None: p = 1."""

    motion: Callable[[Group], Motion]
    divisor: Callable[[State, Group], Tensor] | None


@checked
def edge(optimizer: Optimizer) -> Edge:
    r"""The number that $\lambda_{max}(P^{-1} H)$ must stay below for `optimizer` to be stable at full batch.

    2/lr for gradient descent, $2(1+\beta)/lr$ with momentum, $(2+2\beta_1)/((1-\beta_1) lr)$ for Adam; weight decay as in `formula`.
    Groups may differ in everything but the momentum of Nesterov's method (SGD with nesterov=True, NAdam): the group with the
    largest rate gives the threshold, and `preconditioner` folds the others into P. Costs nothing; read from the live settings.
    Raises TypeError for optimisers without a diagonal P, ValueError for settings that have no edge.
    """
    rule = _rule(optimizer)
    motion = _base(optimizer, rule)
    decay = f"(1 - lr weight_decay / 2) {motion.formula}" if motion.decoupled else motion.formula
    shift = " - weight_decay" if motion.coupled and rule.divisor is None else ""
    return Edge(_threshold(motion, rule), motion.rate, f"{decay} / lr{shift}")


@checked
def preconditioner(optimizer: Optimizer, objective: Objective) -> Tensor:
    r"""The diagonal of P (n,) in the order of theta: the spectrum of $P^{-1} H$ has `edge(optimizer).threshold` as its edge.

    1 for SGD with one group, $\sqrt v + \epsilon$ for RMSprop, $(1-\beta_1^t)(\sqrt{v/(1-\beta_2^t)} + \epsilon)$ for Adam: the P of the
    last step. Different groups, and coupled weight decay w (which adds w to H, not to $P^{-1} H$), are folded in. `objective` must be
    of the model that `optimizer` trains; where it studies a part of the model, the edge is that of this part alone.
    """
    rule = _rule(optimizer)
    threshold = _threshold(_base(optimizer, rule), rule)
    bears = limits(optimizer, objective)
    scale = (bears.curvature - bears.decay) / threshold
    for name in objective.names:
        if not bool((scale[objective.layout[name]] > 0).all()):
            raise ValueError(f"P has entries <= 0 in {name}: its weight decay alone, or eps=0 with a zero gradient, puts it beyond the edge. Lower weight_decay or raise eps.")
    return scale


def limits(optimizer: Optimizer, objective: Objective) -> Limits:
    """What every coordinate bears, read from the live settings and state of `optimizer`; raises as `preconditioner` does."""
    rule = _rule(optimizer)
    _base(optimizer, rule)
    held = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    chosen = _chosen(objective, held)
    like = torch.empty(0, dtype=objective.dtype, device=objective.device)
    if isinstance(optimizer, NAdam):
        _check_nadam_steps(optimizer, chosen, held)
    curvatures, decays, divisors, least, steps = [], [], [], [], math.inf
    for name, parameter in chosen.items():
        motion = rule.motion(held[id(parameter)])
        if motion.rate == 0:
            raise ValueError(f"{name} has learning rate 0, so it does not move. Leave it out: Objective(..., params=...).")
        divisor = like.new_ones(parameter.shape)
        if rule.divisor is not None:
            state = _state(optimizer, name, parameter, like)
            divisor, steps = rule.divisor(state, held[id(parameter)]), min(steps, float(state["step"]))
        curvatures.append(divisor * motion.factor / motion.rate)
        decays.append(divisor * motion.factor * motion.decoupled / 2 + motion.coupled)
        divisors.append(divisor)
        least.append(torch.full_like(divisor, float(held[id(parameter)].get("eps", 0.0))))
    B, D, p, eps = (objective.layout.flatten(parts, like) for parts in (curvatures, decays, divisors, least))
    return Limits(B, D, p, eps, steps)


def _rule(optimizer: Optimizer) -> Rule:
    rule = RULES.get(type(optimizer))
    if rule is None:
        known = ", ".join(kind.__name__ for kind in RULES)
        raise TypeError(
            f"{type(optimizer).__name__} has no diagonal preconditioner that is known here ({known}), so no edge on lambda_max. Use the critical learning rate "
            'along its own update, which needs none: measure(objective, "stability", ...). If it wraps a torch optimiser, pass that one.'
        )
    if any(group["maximize"] for group in optimizer.param_groups):
        raise ValueError("the optimizer maximises (maximize=True), and an edge belongs to minimising. Minimise the negative loss instead.")
    return rule


def _base(optimizer: Optimizer, rule: Rule) -> Motion:
    """The motion of the group with the largest learning rate."""
    motions = [rule.motion(group) for group in optimizer.param_groups]
    moving = [motion for motion in motions if motion.rate > 0]
    if not moving or any(motion.rate < 0 for motion in motions):
        raise ValueError(f"the edge needs a learning rate > 0, and the groups have {', '.join(f'{motion.rate:g}' for motion in motions)}. Ask while it is positive (a warm-up may begin at 0).")
    if len({motion.fixed for motion in moving}) > 1:
        raise ValueError("groups with different momenta have no common edge under Nesterov's method. Give them one momentum, or study one group at a time.")
    return max(moving, key=lambda motion: motion.rate)


def _threshold(motion: Motion, rule: Rule) -> float:
    threshold = motion.edge - (motion.coupled if rule.divisor is None else 0)
    if threshold <= 0:
        raise ValueError(f"weight decay {motion.coupled or motion.decoupled:g} at lr={motion.rate:g} is unstable without any loss. Lower one of them.")
    return threshold


def _chosen(objective: Objective, held: Mapping[int, Group]) -> dict[str, nn.Parameter]:
    """The user's own parameters under study, by name; all must be among those that the optimizer holds."""
    present = objective.snapshot.users.slots.present()
    chosen: dict[str, Any] = {name: present[name] for name in objective.names}
    strangers = [name for name, parameter in chosen.items() if id(parameter) not in held]
    if len(strangers) == len(chosen):
        raise ValueError("the optimizer holds no parameter of the objective's model: it belongs to another one, or to a copy. Make both from the same model.")
    if strangers:
        raise ValueError(f"the optimizer does not hold {', '.join(strangers[:5])}, so it does not move what the objective studies. Leave it out: Objective(..., params=...).")
    return chosen


def _state(optimizer: Optimizer, name: str, parameter: nn.Parameter, like: Tensor) -> State:
    """What the optimizer remembers of a parameter, moved to where the objective lives."""
    state = optimizer.state.get(parameter, {})  # .get: the state is a defaultdict
    if not state or float(state["step"]) == 0:
        stepped = any(float(other.get("step", 0)) > 0 for other in optimizer.state.values())
        if stepped:
            raise ValueError(f"{name} has had no gradient yet, so it does not move. Leave it out: Objective(..., params=...).")
        raise ValueError(f"{type(optimizer).__name__} has no second moments before its first step. Call optimizer.step() once, then ask for its preconditioner.")
    moments = {key: value.detach().to(like) for key, value in state.items() if isinstance(value, Tensor) and value.shape == parameter.shape}
    return moments | {key: float(state[key]) for key in ("step", "mu_product") if key in state}


def _check_nadam_steps(optimizer: Optimizer, chosen: Mapping[str, nn.Parameter], held: Mapping[int, Group]) -> None:
    """NAdam's momentum changes with the step: parameters at different ones have different momenta."""
    seen = {(float(optimizer.state.get(p, {}).get("step", 0)), float(held[id(p)]["momentum_decay"])) for p in chosen.values()}
    if len(seen) > 1 and min(seen)[0] > 0:
        raise ValueError("NAdam's momentum depends on step and momentum_decay, which differ between these parameters. Study those of one group at a time.")


def _heavy_ball(group: Group, momentum: float, gain: float, factor: str, *, decoupled: float = 0.0, coupled: float = 0.0) -> Motion:
    r"""The motion of $v \leftarrow$ momentum $v$ + gain $g$, $\theta \leftarrow \theta - \eta v / p$."""
    if not 0 <= momentum < 1 or gain <= 0:
        raise ValueError(f"momentum {momentum:g} with gain {gain:g} on the gradient has no edge: it needs 0 <= momentum < 1 and dampening < 1.")
    return Motion(float(group["lr"]), 2 * (1 + momentum) / gain, factor, decoupled, coupled)


def _sgd(group: Group) -> Motion:
    momentum, dampening, decay = float(group["momentum"]), float(group["dampening"]), float(group["weight_decay"])
    if momentum == 0:  # torch ignores the others then
        return _heavy_ball(group, 0.0, 1.0, "2", coupled=decay)
    gain, words = (1 - dampening, "2 (1 + momentum)" if dampening == 0 else "2 (1 + momentum) / (1 - dampening)")
    plain = _heavy_ball(group, momentum, gain, words, coupled=decay)
    if not group["nesterov"]:
        return plain
    factor = 2 * (1 + momentum) / (1 + momentum + momentum * gain)
    return Motion(plain.rate, factor, "2 (1 + momentum) / (1 + 2 momentum)", coupled=decay, fixed=("nesterov", momentum, dampening))


def _adam(group: Group) -> Motion:
    beta = float(group["betas"][0])
    decay, decoupled = float(group["weight_decay"]), bool(group["decoupled_weight_decay"])
    return _heavy_ball(
        group, beta, 1 - beta, "2 (1 + beta1) / (1 - beta1)", decoupled=decay if decoupled else 0.0, coupled=0.0 if decoupled else decay
    )


def _adamw(group: Group) -> Motion:
    return _adam({**group, "decoupled_weight_decay": True})  # older versions of torch have no such key


def _nadam(group: Group) -> Motion:
    beta, plain = float(group["betas"][0]), _adam(group)
    factor = 2 * (1 + beta) / ((1 + 2 * beta) * (1 - beta))
    return Motion(plain.rate, factor, "2 (1 + beta1) / ((1 + 2 beta1) (1 - beta1))", plain.decoupled, plain.coupled, fixed=(beta,))


def _rmsprop(group: Group) -> Motion:
    momentum = float(group["momentum"])
    return _heavy_ball(group, momentum, 1.0, "2 (1 + momentum)" if momentum else "2", coupled=float(group["weight_decay"]))


def _adagrad(group: Group) -> Motion:
    return _heavy_ball(group, 0.0, 1.0, "2", coupled=float(group["weight_decay"]))


def _adam_divisor(state: State, group: Group) -> Tensor:
    step = float(state["step"])
    first, second = (1 - math.pow(float(beta), step) for beta in group["betas"])
    moment: Tensor = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
    return first * ((moment / second).sqrt() + float(group["eps"]))


def _nadam_divisor(state: State, group: Group) -> Tensor:
    r"""The step is $\eta (a g + c m) / (\sqrt{\hat v} + \epsilon)$; divided by what a and c make of the edge, against their limits."""
    beta, step, product = float(group["betas"][0]), float(state["step"]), float(state["mu_product"])
    mu, following = (beta * (1 - 0.5 * math.pow(0.96, t * float(group["momentum_decay"]))) for t in (step, step + 1))
    a, c = (1 - mu) / (1 - product), following / (1 - product * following)
    second = 1 - math.pow(float(group["betas"][1]), step)
    moment: Tensor = state["exp_avg_sq"]
    return ((moment / second).sqrt() + float(group["eps"])) * (1 - beta) * (1 + 2 * beta) / (a * (1 + beta) + c * (1 - beta))


def _rmsprop_divisor(state: State, group: Group) -> Tensor:
    moment: Tensor = state["square_avg"]
    if group["centered"]:
        moment = (moment - state["grad_avg"] ** 2).clamp(min=0)
    return moment.sqrt() + float(group["eps"])


def _adagrad_divisor(state: State, group: Group) -> Tensor:
    moment: Tensor = state["sum"]
    return (moment.sqrt() + float(group["eps"])) * (1 + (float(state["step"]) - 1) * float(group["lr_decay"]))


RULES: dict[type[Optimizer], Rule] = {
    torch.optim.SGD: Rule(_sgd, None),
    torch.optim.Adam: Rule(_adam, _adam_divisor),
    torch.optim.AdamW: Rule(_adamw, _adam_divisor),
    NAdam: Rule(_nadam, _nadam_divisor),
    torch.optim.RMSprop: Rule(_rmsprop, _rmsprop_divisor),
    torch.optim.Adagrad: Rule(_adagrad, _adagrad_divisor),
}

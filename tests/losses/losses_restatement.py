"""Every objective once more, in NumPy float64, straight from the formulas of the papers.

Nothing here is shared with `dpo_keras.losses`: no scores, no links, no forms. Each function states
the loss of a pair whose *first* response won in the papers' symbols, and a soft label y is the mean
of that and of the same with the two responses exchanged.
"""

import numpy as np


def log_sigmoid(x):
    return -np.logaddexp(0.0, -x)


def sigmoid(x):
    return np.exp(log_sigmoid(x))


def exp_minus_one(x):
    """exp(x) - 1, with the tangent at 30 in place of the curve beyond it."""
    return np.where(x <= 30, np.expm1(np.minimum(x, 30)), np.e**30 * (1 + x - 30) - 1)


class Pair:
    """The symbols of the formulas for one batch, first response w (won), second l (lost)."""

    def __init__(self, outputs, kwargs):
        get = {k: np.asarray(v, "float64") for k, v in outputs.items()}
        self.beta = kwargs.get("beta", 0.1)
        self.eps = kwargs.get("label_smoothing", 0.0)
        self.kwargs = kwargs
        self.pi_w, self.pi_l = get["policy"].T
        self.n_w, self.n_l = get["lengths"].T
        self.ref_w, self.ref_l = get["reference"].T
        self.c, self.r = self.pi_w - self.ref_w, self.pi_l - self.ref_l
        self.c_plain, self.r_plain = self.c, self.r
        if "ld_alpha" in kwargs:
            a = kwargs["ld_alpha"]
            shared = (get["policy_shared"] - get["reference_shared"]).T
            self.c = (1 - a) * shared[0] + a * self.c
            self.r = (1 - a) * shared[1] + a * self.r
        self.m = get["margin"] if kwargs.get("margin") else 0.0
        self.w = get["wpo_log_weight"].sum(axis=1)
        g = DIVERGENCES[kwargs.get("divergence", "reverse_kl")]
        self.c, self.r = (g(x, kwargs.get("divergence_alpha", 0.5)) for x in (self.c, self.r))

    @property
    def delta(self):
        return self.c - self.r - self.m / self.beta

    @property
    def means(self):
        return self.pi_w / self.n_w, self.pi_l / self.n_l


DIVERGENCES = {
    "reverse_kl": lambda x, a: x,
    "forward_kl": lambda x, a: -exp_minus_one(-x),
    "js": lambda x, a: np.log(2) + log_sigmoid(x),
    "alpha": lambda x, a: exp_minus_one((a - 1) * x) / (a - 1),
}


def smoothed(p, z):
    return -(1 - p.eps) * log_sigmoid(z) - p.eps * log_sigmoid(-z)


def discopop(p):
    z, tau = p.beta * p.delta, p.kwargs.get("discopop_tau", 0.05)
    logistic = -log_sigmoid(z)
    # exp(-z) times the gate, in logarithms: the plain product is inf times zero.
    exponential = np.exp(-z - np.logaddexp(0, -z / tau))
    return sigmoid(-z / tau) * logistic + exponential


def orpo(p):
    log_odds = [m - np.log(-np.expm1(m)) for m in p.means]
    return -p.means[0] - p.beta * log_sigmoid(log_odds[0] - log_odds[1] - p.m)


def alphapo(p):
    a, g = p.kwargs.get("alphapo_alpha", 0.25), p.kwargs.get("gamma", 0.5)
    rewards = [-exp_minus_one(-a * m) / a for m in p.means]
    return smoothed(p, p.beta * (rewards[0] - rewards[1]) - g - p.m)


def ipo(p):
    if p.kwargs.get("length_normalize", True):
        gap = p.c_plain / p.n_w - p.r_plain / p.n_l
    else:
        gap = p.c_plain - p.r_plain
    return (gap - p.m / p.beta - 1 / (2 * p.beta)) ** 2


LOSSES = {
    "sigmoid": lambda p: smoothed(p, p.beta * p.delta),
    "hinge": lambda p: np.maximum(0, 1 - p.beta * p.delta),
    "ipo": ipo,
    "nca_pair": lambda p: (
        -log_sigmoid(p.beta * p.c)
        - 0.5 * log_sigmoid(-p.beta * p.c)
        - 0.5 * log_sigmoid(-p.beta * p.r)
    ),
    "robust": lambda p: (
        (-(1 - p.eps) * log_sigmoid(p.beta * p.delta) + p.eps * log_sigmoid(-p.beta * p.delta))
        / (1 - 2 * p.eps)
    ),
    "bco_pair": lambda p: -log_sigmoid(p.beta * p.c) - log_sigmoid(-p.beta * p.r),
    "sppo_hard": lambda p: (
        (p.c_plain - 1 / (2 * p.beta)) ** 2 + (p.r_plain + 1 / (2 * p.beta)) ** 2
    ),
    "apo_zero": lambda p: 1 - sigmoid(p.beta * p.c) + sigmoid(p.beta * p.r),
    "apo_down": lambda p: sigmoid(p.beta * p.c) + 1 - sigmoid(p.beta * p.delta),
    "discopop": discopop,
    "sigmoid_norm": lambda p: smoothed(p, p.beta * (p.c_plain / p.n_w - p.r_plain / p.n_l) - p.m),
    "simpo": lambda p: smoothed(
        p, p.beta * (p.means[0] - p.means[1]) - p.kwargs.get("gamma", 0.5) - p.m
    ),
    "cpo": lambda p: (
        smoothed(p, p.beta * (p.pi_w - p.pi_l) - p.m) - p.kwargs.get("cpo_alpha", 1.0) * p.means[0]
    ),
    "slic": lambda p: np.maximum(0, 1 + p.m - p.beta * (p.pi_w - p.pi_l)),
    "orpo": orpo,
    "alphapo": alphapo,
    "sft": lambda p: -p.means[0],
}


def exo_pair(p, y):
    target = y * (1 - p.eps) + (1 - y) * p.eps
    z = p.beta * p.delta
    return sigmoid(z) * (log_sigmoid(z) - np.log(target)) + sigmoid(-z) * (
        log_sigmoid(-z) - np.log(1 - target)
    )


def exchanged(outputs):
    return {k: v[:, ::-1] if np.ndim(v) == 2 else v for k, v in outputs.items()}


def preference_loss(kwargs, y, outputs):
    """The loss of each pair `[N]` of one objective by name (AOT apart)."""
    first, second = Pair(outputs, kwargs), Pair(exchanged(outputs), kwargs)
    if kwargs["loss_type"] == "exo_pair":
        value = exo_pair(first, y)
    else:
        loss = LOSSES[kwargs["loss_type"]]
        value = y * loss(first) + (1 - y) * loss(second)
    if kwargs.get("wpo"):
        value = value * np.minimum(np.exp(first.w), kwargs.get("wpo_max_weight", np.inf))
    return value


def aot(kwargs, outputs):
    """The multiset of AOT's values for labels of one, sorted."""
    p = Pair(outputs, kwargs)
    if kwargs["loss_type"] == "aot":
        gap = np.sort(p.pi_w - p.pi_l) - np.sort(p.ref_w - p.ref_l)
    else:
        gap = np.sort(p.c) - np.sort(p.r)
    return np.sort(smoothed(p, p.beta * gap))


def kto(kwargs, y, outputs):
    """KTO's loss of each response `[N]`, its derivative by the response's log π, and z."""
    beta = kwargs.get("beta", 0.1)
    good, bad = (kwargs.get(f"{name}_weight", 1.0) for name in ("desirable", "undesirable"))
    c, mismatched = (outputs["policy"] - outputs["reference"]).T
    z = max(0.0, mismatched.mean())
    if_good, if_bad = 1 - sigmoid(beta * (c - z)), 1 - sigmoid(beta * (z - c))
    slope = beta * if_good * if_bad  # of σ, either way
    loss = y * good * if_good + (1 - y) * bad * if_bad
    return loss, (-y * good + (1 - y) * bad) * slope, z


CASES = {
    **{name: {"loss_type": name} for name in LOSSES},
    "exo_pair": {"loss_type": "exo_pair", "label_smoothing": 0.05},
    "sigmoid, beta 1.5": {"loss_type": "sigmoid", "beta": 1.5},
    "cDPO": {"loss_type": "sigmoid", "label_smoothing": 0.2},
    "ipo, sums": {"loss_type": "ipo", "length_normalize": False},
    "robust, noisy": {"loss_type": "robust", "label_smoothing": 0.3},
    "discopop, tau 0.5": {"loss_type": "discopop", "discopop_tau": 0.5},
    "sigmoid_norm, beta 5": {"loss_type": "sigmoid_norm", "beta": 5.0, "label_smoothing": 0.1},
    "simpo, usual": {"loss_type": "simpo", "beta": 2.5, "gamma": 1.4},
    "simpo, smoothed": {"loss_type": "simpo", "beta": 2.0, "label_smoothing": 0.1},
    "cpo, light": {"loss_type": "cpo", "cpo_alpha": 0.1, "label_smoothing": 0.1},
    "alphapo, negative": {"loss_type": "alphapo", "alphapo_alpha": -0.5, "beta": 2.0},
    "alphapo, strong": {"loss_type": "alphapo", "alphapo_alpha": 1.0, "gamma": 0.0},
    "margin": {"loss_type": "sigmoid", "margin": True, "beta": 0.3},
    "margin, hinge": {"loss_type": "hinge", "margin": True},
    "margin, ipo": {"loss_type": "ipo", "margin": True},
    "margin, orpo": {"loss_type": "orpo", "margin": True},
    "ld": {"loss_type": "sigmoid", "ld_alpha": 0.3},
    "ld, bco_pair": {"loss_type": "bco_pair", "ld_alpha": 0.0},
    "wpo": {"loss_type": "sigmoid", "wpo": True},
    "wpo, bounded": {"loss_type": "ipo", "wpo": True, "wpo_max_weight": 1.0},
    **{
        f"{name}, {divergence}": {"loss_type": name, "divergence": divergence}
        for name in ("sigmoid", "hinge", "robust", "nca_pair", "apo_zero", "discopop")
        for divergence in ("forward_kl", "js", "alpha")
    },
    "alpha 0.2": {"loss_type": "sigmoid", "divergence": "alpha", "divergence_alpha": 0.2},
    "alpha 1.5": {"loss_type": "sigmoid", "divergence": "alpha", "divergence_alpha": 1.5},
}

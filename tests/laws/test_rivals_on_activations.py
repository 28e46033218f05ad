"""Chain of Merges, gradient fusion and LoRACLR against plain float64 transcriptions."""

from __future__ import annotations

import pytest
import torch
from oracle import SITES, Net, captured_inputs, changed, dense_changes, difference, make_data
from test_methods import DENSE, LORAS, WIDE, merge, references
from torch import nn
from torch.nn import functional as F

from iteris_core import SolveError

DATA = make_data(3)


@pytest.mark.parametrize("shrink", [1.0, 0.9])
def test_chain_of_merges_fits_each_loras_own_outputs(shrink):
    """Every site by plain least squares on inputs that passed the merged sites before it."""
    ours = merge(LORAS, "chain-of-merges", ridge=0.0, shrink=shrink, rank=WIDE).lora
    base = Net()
    whole = changed(base, dense_changes(ours))
    seen = [captured_inputs(whole, x) for x in DATA]
    for site in SITES:
        weight = base.get_submodule(site).weight.detach().flatten(1)
        left = torch.zeros_like(weight)
        total = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)
        for dense, x, merged in zip(DENSE, references(), seen, strict=True):
            target = x[site] @ (weight + dense[site]).mT - merged[site] @ weight.mT
            gram = merged[site].mT @ merged[site]
            left += shrink * target.mT @ merged[site] + (1 - shrink) * dense[site] * gram.diag()
            total += shrink * gram + (1 - shrink) * gram.diag().diag()
        wanted = left @ torch.linalg.inv(total)
        found = ours.sites[site].dense()
        assert float((found - wanted).norm() / wanted.norm()) < 1e-2, site


def test_chain_of_merges_is_the_plain_sweep():
    plain = {"ridge": 1e-5, "weighting": "none", "repair": False, "saliency": 0.0}
    sweep = merge(LORAS, "iteris", row_tokens="all", precision="float32", **plain)
    ours = merge(LORAS, "chain-of-merges", ridge=1e-5)
    assert difference(ours.lora, dense_changes(sweep.lora)) < 1e-5


def fused(site, steps):
    """W from W0 by torch's L-BFGS on the mean squared error of all tokens together."""
    base = Net()
    start = base.get_submodule(site).weight.detach().flatten(1)
    inputs = [x[site] for x in references()]
    wanted = torch.cat([x @ (start + d[site]).mT for x, d in zip(inputs, DENSE, strict=True)])
    x, weight = torch.cat(inputs), start.clone().requires_grad_()
    lbfgs = torch.optim.LBFGS(
        [weight], lr=1, max_iter=steps, history_size=25, line_search_fn="strong_wolfe",
        tolerance_grad=1e-16, tolerance_change=1e-16,
    )  # fmt: skip

    def closure():
        lbfgs.zero_grad()
        loss = F.mse_loss(F.linear(x, weight), wanted)
        loss.backward()
        return loss

    lbfgs.step(closure)
    return weight.detach() - start


def loss_of(site, change):
    """‖X (ΔW − ΔW_i)ᵀ‖² over the tokens of all LoRAs."""
    pairs = zip(references(), DENSE, strict=True)
    return sum(float((x[site] @ (change - dense[site]).mT).square().sum()) for x, dense in pairs)


@pytest.mark.parametrize("steps", [5, 50])
def test_gradient_fusion_takes_the_steps_of_lbfgs_on_weights(steps):
    ours = merge(LORAS, "gradient-fusion", steps=steps).lora
    for site in SITES:
        wanted = fused(site, steps)
        found = ours.sites[site].dense()
        if steps == 5:
            assert float((found - wanted).norm() / wanted.norm()) < 1e-5, site
        # Rounding grows with the steps along directions that hardly matter: moments are float32.
        assert loss_of(site, found) == pytest.approx(loss_of(site, wanted), rel=1e-4), site
        assert ours.sites[site].rank <= 7


def test_gradient_fusion_ends_at_regmean():
    ours = merge(LORAS, "gradient-fusion", steps=2000).lora
    exact = dense_changes(merge(LORAS, "regmean", shrink=1.0).lora)
    assert difference(ours, exact) < 1e-3
    few = merge(LORAS, "gradient-fusion", steps=1).lora
    assert difference(few, exact) > 1e-2


def contrasted(site, steps, rate, margin, contrast, error, size):
    """AdamW on an offset from W0, with the published loss on stacked features."""
    base = Net()
    start = base.get_submodule(site).weight.detach().flatten(1)
    inputs = torch.stack([x[site] for x in references()])
    wanted = torch.stack([x @ (start + d[site]).mT for x, d in zip(inputs, DENSE, strict=True)])
    offset = nn.Parameter(torch.zeros_like(start))
    adam = torch.optim.AdamW([offset], lr=rate, weight_decay=1e-4)
    best, least, pushed = None, float("inf"), False
    for _ in range(steps):
        given = inputs @ (start + offset).mT
        apart = torch.cdist(given.flatten(1)[None], wanted.flatten(1)[None])[0]
        negative = (apart + torch.eye(3).double() * 1e30).min(dim=1).values
        squares = ((given - wanted) ** 2).sum((1, 2))
        hinge = (margin - negative).clamp(min=0) ** 2
        pushed |= bool((hinge > 0).any())
        loss = (
            contrast * (squares + hinge).mean()
            + error * F.mse_loss(given, wanted)
            + size * offset.norm()
        )
        if loss.item() < least:
            best, least = offset.detach().clone(), loss.item()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return best, pushed


@pytest.mark.parametrize("margin", [0.5, 80.0])
def test_loraclr_is_adam_on_the_published_loss(margin):
    settings = {"rate": 1e-2, "margin": margin, "contrast": 1.0, "error": 0.1, "size": 0.05}
    ours = merge(LORAS, "loraclr", steps=60, rank=WIDE, **settings).lora
    pushes = 0
    for site in SITES:
        wanted, pushed = contrasted(site, 60, **settings)
        pushes += pushed
        found = ours.sites[site].dense()
        assert float((found - wanted).norm() / wanted.norm()) < 1e-2, site
    assert (pushes > 0) == (margin > 1)


def test_loraclr_ends_at_regmean_where_nothing_pushes():
    ours = merge(LORAS, "loraclr", steps=600, rate=2e-2, margin=0.0, size=0.0, rank=WIDE).lora
    exact = dense_changes(merge(LORAS, "regmean", shrink=1.0).lora)
    assert difference(ours, exact) < 0.15


def test_loraclr_pairs_as_many_tokens_as_all_have():
    """Rows beyond those of the concept with the fewest are left out."""
    data = [rows[: 6 - i] for i, rows in enumerate(make_data(3))]
    short = [rows[:4] for rows in data]
    settings = {"steps": 30, "rate": 1e-2, "rank": WIDE}
    ours = merge(LORAS, "loraclr", data, **settings)
    assert (
        difference(ours.lora, dense_changes(merge(LORAS, "loraclr", short, **settings).lora)) < 1e-4
    )


@pytest.mark.parametrize("name", ["chain-of-merges", "gradient-fusion", "loraclr", "wudi"])
def test_none_needs_gradients_of_the_caller(name):
    """ComfyUI runs nodes in inference mode, where autograd keeps nothing."""
    plain = merge(LORAS, name).lora
    with torch.inference_mode():
        inside = merge(LORAS, name).lora
    assert difference(inside, dense_changes(plain)) < 1e-6


def test_loraclr_says_where_numbers_are_not_finite():
    data = make_data(3)
    data[1][0, 0, 0] = float("nan")
    with pytest.raises(SolveError, match=r"Site q: .* NaN"):
        merge(LORAS, "loraclr", data)
    with pytest.raises(SolveError, match=r"Site q: .* NaN"):
        merge(LORAS, "gradient-fusion", data)

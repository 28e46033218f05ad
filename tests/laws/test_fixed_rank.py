"""Rivals of a fixed rank against dense transcriptions of what their authors' code computes."""

from __future__ import annotations

import pytest
import torch
from oracle import SITES, dense_changes, difference, make_lora
from peft.utils import merge_utils
from test_methods import DENSE, LORAS, WIDE, merge

from iteris_core import SettingsError


def best(matrix, rank):
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vt[:rank]


def isotropic(matrix):
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    rank = int(torch.linalg.matrix_rank(matrix))
    return s[:rank].mean() * u[:, :rank] @ vt[:rank]


def tsv(changes):
    """get_tsv_delta_w of the Core Space repository: matrices of zeros, filled LoRA by LoRA."""
    share = int(min(changes[0].shape) / len(changes))
    out, width = changes[0].shape
    us, ss, vs = torch.zeros(out, min(out, width)), torch.zeros(min(out, width)), None
    us, ss = us.double(), ss.double()
    vs = torch.zeros(min(out, width), width).double()
    for index, change in enumerate(changes):
        u, s, vt = torch.linalg.svd(change, full_matrices=False)
        part = slice(index * share, (index + 1) * share)
        us[:, part], ss[part], vs[part] = u[:, :share], s[:share], vt[:share]
    keep = ss > 1e-9  # the source keeps directions of no size, which Procrustes may not turn
    pu, _, qu = torch.linalg.svd(us[:, keep], full_matrices=False)
    pv, _, qv = torch.linalg.svd(vs[keep], full_matrices=False)
    return pu @ qu @ ss[keep].diag() @ pv @ qv


def ties(matrices, density):
    stacked = torch.stack([merge_utils.magnitude_based_pruning(m, density) for m in matrices])
    mask = merge_utils.calculate_majority_sign_mask(stacked)
    return merge_utils.disjoint_merge(stacked, mask & (stacked != 0))


def bases(site):
    """U_B_ref and Vh_A_ref of the sources."""
    ups = torch.cat([lora.sites[site].up for lora in LORAS], dim=1)
    downs = torch.cat([lora.sites[site].down for lora in LORAS])
    return (
        torch.linalg.svd(ups, full_matrices=False).U,
        torch.linalg.svd(downs, full_matrices=False).Vh,
    )


def tucker(changes, rank):
    """HOOI of (out, in, LoRA) by unfoldings of the whole tensor, from the HOSVD, as tensorly's
    partial_tucker does it."""
    tensor = torch.stack(changes, dim=-1)
    rows, columns = tensor.flatten(1), tensor.transpose(0, 1).flatten(1)
    u, v = (torch.linalg.svd(m, full_matrices=False).U[:, :rank] for m in (rows, columns))
    errors = []
    for _ in range(1000):
        seen = torch.einsum("oit,ir->ort", tensor, v).flatten(1)
        u = torch.linalg.svd(seen, full_matrices=False).U[:, :rank]
        seen = torch.einsum("oit,or->irt", tensor, u).flatten(1)
        v = torch.linalg.svd(seen, full_matrices=False).U[:, :rank]
        kept = torch.einsum("oit,or,is->rst", tensor, u, v).norm() ** 2
        errors.append(float((tensor.norm() ** 2 - kept).clamp(min=0).sqrt() / tensor.norm()))
        if len(errors) > 1 and abs(errors[-1] - errors[-2]) < 1e-6:
            break
    return u, v


@pytest.mark.parametrize("rank", [None, 2])
def test_iso_c_evens_the_spectrum_of_the_sum(rank):
    ours = merge(LORAS, "iso-c", rank=rank, scale=0.7).lora
    for site in SITES:
        total = sum(dense[site] for dense in DENSE)
        wanted = 0.7 * isotropic(total if rank is None else best(total, rank))
        torch.testing.assert_close(ours.sites[site].dense(), wanted, atol=1e-9, rtol=1e-9)


def test_tsv_m_is_its_published_algorithm():
    ours = merge(LORAS, "tsv-m", scale=0.7).lora
    cut = merge(LORAS, "tsv-m", scale=0.7, rank=2).lora
    for site in SITES:
        wanted = 0.7 * tsv([dense[site] for dense in DENSE])
        torch.testing.assert_close(ours.sites[site].dense(), wanted, atol=1e-9, rtol=1e-9)
        assert cut.sites[site].rank == 2
        torch.testing.assert_close(cut.sites[site].dense(), best(wanted, 2), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("isotropy", [False, True])
def test_core_space_is_ties_in_shared_bases(isotropy):
    settings = {"density": 0.4, "scale": 0.9, "isotropic": isotropy, "rank": 3}
    ours = merge(LORAS, "core-space", **settings).lora
    for site in SITES:
        left, right = bases(site)
        merged = 0.9 * ties([left.mT @ dense[site] @ right.mT for dense in DENSE], 0.4)
        merged = isotropic(best(merged, 3)) if isotropy else best(merged, 3)
        wanted = left @ merged @ right
        torch.testing.assert_close(ours.sites[site].dense(), wanted, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
def test_compress_then_merge_is_ties_in_the_tucker_directions(beta):
    settings = {"density": 0.5, "scale": 0.75, "own_norm": beta, "rank": 2}
    ours = merge(LORAS, "compress-then-merge", **settings).lora
    for site in SITES:
        changes = [dense[site] for dense in DENSE]
        norms = torch.stack([change.norm() for change in changes])
        sizes = (beta * norms + (1 - beta) * norms.mean()) / norms
        u, v = tucker([c * size for c, size in zip(changes, sizes, strict=True)], 2)
        assert ours.sites[site].rank == 2
        wanted = 0.75 * u @ ties([u.mT @ change @ v for change in changes], 0.5) @ v.mT
        torch.testing.assert_close(ours.sites[site].dense(), wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["mean", "tsv-m"])
def test_pico_is_its_published_calibration(kind):
    ours = merge(LORAS, "pico", merge=kind).lora
    cut = merge(LORAS, "pico", merge=kind, rank=2).lora
    for site in SITES:
        changes = [dense[site] for dense in DENSE]
        ups = torch.cat([lora.sites[site].up for lora in LORAS], dim=1)
        u, sigma, _ = torch.linalg.svd(ups, full_matrices=False)
        alpha = 1 / (1 + 2 * sigma**2 / (sigma**2).sum())
        operator = torch.eye(len(u)).double() + u @ (alpha - 1).diag() @ u.mT
        calmed = [operator @ change for change in changes]
        merged = sum(calmed) / 3 if kind == "mean" else tsv(calmed)
        wanted = merged * sum(c.norm() for c in changes) / 3 / merged.norm()
        torch.testing.assert_close(ours.sites[site].dense(), wanted, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(cut.sites[site].dense(), best(wanted, 2), atol=1e-9, rtol=1e-9)


def test_iso_c_of_one_lora_has_its_norm_and_directions():
    lora = make_lora(1)
    ours = merge([lora], "iso-c").lora
    wanted = {site: isotropic(change) for site, change in dense_changes(lora).items()}
    assert difference(ours, wanted) < 1e-9


def test_a_share_is_no_rank_of_compress_then_merge():
    with pytest.raises(SettingsError, match="rank"):
        merge(LORAS, "compress-then-merge", rank=0.9)


def test_one_lora_more_than_a_side_has_directions():
    """Σ r_i above the shorter side, at which bases and frames are square."""
    loras = [make_lora(seed, rank=5) for seed in range(1, 5)]
    for name in ("tsv-m", "iso-c", "core-space", "compress-then-merge", "pico"):
        for site, change in merge(loras, name, rank=WIDE).lora.sites.items():
            assert bool(torch.isfinite(change.dense()).all()), (name, site)

"""Memory that runs out in a forward: it runs with fewer rows, or the error says what to lower."""

import pytest
import torch
from oracle import hooks_on
from small_merge import GUIDED
from tiny import two_concepts

from iteris_core import merge_loras
from iteris_core.errors import OutOfMemory


class Limited:
    """The denoiser has memory for ``most`` rows at once, from the step ``since`` on."""

    def __init__(self, unet, most, since=""):
        self.most, self.since, self.step, self.refused = most, since, "", []
        self.rows = {}
        self.hook = unet.conv_in.register_forward_pre_hook(self.forward)

    def on_progress(self, progress):
        self.step = progress.what

    def forward(self, layer, args):
        rows = len(args[0])
        if rows > self.most and self.since in self.step:
            self.refused.append((self.step, rows))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.rows[self.step] = max(rows, self.rows.get(self.step, 0))


def merged(host, limited):
    merge = merge_loras(
        host,
        two_concepts(host),
        settings={"steps": 0},  # steps grow what rounding leaves
        calibration=GUIDED,
        memory_budget=None,
        on_progress=limited.on_progress,
    )
    limited.hook.remove()
    return merge.lora.sites, merge.report


@pytest.mark.slow
def test_fewer_samples_and_rows_run_at_once_and_the_merge_is_the_same(host):
    free = Limited(host.pipeline.unet, 1000)
    whole, report = merged(host, free)
    limited = Limited(host.pipeline.unet, 6)
    found, less = merged(host, limited)
    for step, most in (("denoising steps", 32), ("held-out rows", 8)):
        assert free.rows[step] == most
        refused = [rows for at, rows in limited.refused if at == step]
        assert refused == sorted(set(refused), reverse=True), "a size that failed is tried again"
        assert refused
        assert limited.rows[step] == 4
    for site, change in whole.items():
        assert (found[site].dense() - change.dense()).norm() < 1e-3 * change.dense().norm(), site
    for use, shares in report.kept.items():
        assert less.kept[use] == pytest.approx(shares, abs=1e-2)


@pytest.mark.parametrize("step", ["checking the sites", "planning", "denoising steps"])
def test_where_one_row_is_too_many_the_error_says_what_to_lower(host, step):
    before = [weight.clone() for weight in host.pipeline.unet.parameters()]
    limited = Limited(host.pipeline.unet, 0, step)
    hooks = hooks_on(host.pipeline.unet)  # with that of the limit
    with pytest.raises(OutOfMemory, match=r"Out of memory.*Lower .*latent_size") as raised:
        merged(host, limited)
    assert "model is unchanged" in str(raised.value)
    assert hooks_on(host.pipeline.unet) == hooks
    assert all(map(torch.equal, before, host.pipeline.unet.parameters()))

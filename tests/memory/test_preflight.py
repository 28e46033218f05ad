"""Layers that cannot be merged are found before any work: refused, left out, or averaged."""

import pytest
import torch
from oracle import ModuleHost, Net, hooks_on, make_data, make_lora

from iteris_core import Calibration, Concept, IterisError, merge_loras
from iteris_core.errors import SiteError
from iteris_core.linalg import truncate_factors
from iteris_core.preview import preview_merge
from iteris_core.report.provenance import cut_lora

SITES = ("q", "up")


class Half(Net):
    """``up`` is reached by no forward."""

    def forward(self, x):
        return self.q(x)


class Model(Net):
    """``up`` gets what ``between`` makes of the outputs of ``q``, (rows, tokens, width)."""

    def __init__(self, between=lambda x: x):
        super().__init__()
        self.between = between

    def forward(self, x):
        out = self.up(self.between(self.q(x)))
        return out if len(out) == len(x) else out.reshape(len(x), -1, out.shape[-1])


def joined(x):
    return x.reshape(1, -1, x.shape[-1])


def frames(x):
    return x.reshape(-1, 1, x.shape[-1])


class Mixing(Model):
    """The rows of its output are no rows of the batch."""

    def forward(self, x):
        return self.up(self.between(self.q(x)))


CASES = [
    (Half, "is not used by this base"),
    (lambda: Mixing(lambda x: x.sum(dim=0, keepdim=True)), "mixed or split"),
    (lambda: Mixing(lambda x: joined(x.transpose(0, 1))), "mixed or split"),
    # Tokens above nothing of all rows, as experts get them.
    (lambda: Mixing(lambda x: x[x.sum(dim=2) > 0]), "mixed or split"),
    # The sum of each row's tokens, once for all rows and then once more.
    (lambda: Mixing(lambda x: x.sum(dim=1, keepdim=True).repeat(2, 1, 1)), "mixed or split"),
]


class PictureHost(ModuleHost):
    pictures = True

    def samples(self, request):
        self.asked = [*getattr(self, "asked", ()), request.calibration]
        return super().samples(request)


def concepts():
    return [Concept(make_lora(i, sites=SITES), prompts=["unused"], weight=i) for i in (1, 2)]


@pytest.mark.parametrize(("model", "why"), CASES)
def test_it_is_refused_with_site_and_file_before_samples_are_made(model, why):
    host = PictureHost(model(), make_data())
    with pytest.raises(
        IterisError, match=rf"1 sites, such as up \(in lora-1, lora-2\): it .*{why}"
    ):
        merge_loras(host, concepts())
    # Once more with all prompts, for layers that wait for words which one of them may lack.
    assert [one.samples for one in host.asked] == [1, Calibration().samples]
    assert {calibration.latents for calibration in host.asked} == {"noise"}
    assert hooks_on(host.model) == 0


@pytest.mark.parametrize(("model", "why"), CASES)
def test_the_merge_goes_on_without_it_or_it_has_the_mean(model, why):
    result = merge_loras(PictureHost(model(), make_data()), concepts(), unmergeable="skip")
    assert set(result.lora.sites) == {"q"}
    assert f"{why}; they are LEFT OUT" in result.report.summary()
    some = concepts()
    result = merge_loras(PictureHost(model(), make_data()), some, unmergeable="mean")
    assert f"{why}; they get the mean" in result.report.summary()
    one, two = (concept.lora.sites["up"].dense() for concept in some)
    torch.testing.assert_close(result.lora.sites["up"].dense(), (one + 2 * two) / 3)


def test_a_mean_is_cut_to_a_rank_at_its_best():
    """As with the rank of the node that saves a LoRA."""
    host = PictureHost(Half(), make_data())
    result = merge_loras(host, concepts(), unmergeable="mean")
    whole = result.lora.sites["up"]
    cut = cut_lora(result.lora, 2, ordered=True).sites["up"]
    best = truncate_factors(whole, 2)[0]
    assert cut.rank == 2
    torch.testing.assert_close(cut.dense(), best.dense())


@pytest.mark.parametrize("schedule", ["sweep", "jacobi"])
@pytest.mark.parametrize("between", [joined, frames])
def test_rows_that_stand_in_another_dimension_are_told_apart(between, schedule):
    """The merge is that of the model whose layer gets them in the first one."""

    def merged(model):
        settings = {"schedule": schedule, "precision": "float64", "micro_batch": 5}
        return merge_loras(
            PictureHost(model, make_data()), concepts(), settings=settings
        ).lora.sites

    wanted, found = merged(Model()), merged(Model(between))
    assert set(found) == {"q", "up"}
    for site, change in wanted.items():
        torch.testing.assert_close(found[site].dense(), change.dense())


@pytest.mark.parametrize(
    ("tokens", "stands"),
    [
        ([[1.0, 0.0], [0.0, 2.0]], True),
        # What repeats within a row would look the same in another order.
        ([[1.0, 1.0], [1.0, 1.0]], False),
    ],
)
def test_rows_that_give_a_layer_the_same_tokens_are_told_apart(tokens, stands):
    """As an image's height and width are embedded: those of all rows in one dimension."""
    size = torch.zeros(2, 12, dtype=torch.float64)
    size[:, :2] = torch.tensor(tokens)

    def between(x):
        return joined(size.expand(len(x), -1, -1))

    host = PictureHost(Model(between), make_data())
    if stands:
        assert set(merge_loras(host, concepts()).lora.sites) == {"q", "up"}
    else:
        with pytest.raises(SiteError, match="mixed or split"):
            merge_loras(host, concepts())


def test_nothing_is_left_of_it():
    some = [Concept(make_lora(1, sites=("up",)), prompts=["unused"])]
    with pytest.raises(IterisError, match="is not used by this base"):
        merge_loras(PictureHost(Half(), make_data()), some, unmergeable="skip")


class Twice(Model):
    """``up`` is called two times in a forward."""

    def forward(self, x):
        return super().forward(x) + super().forward(-x)


@pytest.mark.parametrize("between", [lambda x: x, joined])
def test_a_method_that_sweeps_refuses_a_repeated_site(between):
    some = [Concept(make_lora(i, sites=("up",)), prompts=["unused"]) for i in (1, 2)]
    with pytest.raises(SiteError, match=r"up \(in lora-1, lora-2\): it is called more than once"):
        preview_merge(PictureHost(Twice(between), make_data()), some, "regmean++")
    assert preview_merge(PictureHost(Twice(between), make_data()), some, "regmean").plan

"""A ComfyUI MODEL and CLIP as host: the one file that knows ComfyUI's internals.

Nothing of them is patched. Text encoders run in batches of their own, and ComfyUI then puts the
conditioning of every prompt together from those outputs; the denoiser runs as ComfyUI's samplers
run it (`calc_cond_batch`, positive only), so pooled outputs, sizes, guidance, wrappers and hooks
are what they would be there. LoRA files are read through ComfyUI's own key maps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.model_management as memory
import comfy.model_patcher
import comfy.model_sampling
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import comfy.sd
import comfy.sd1_clip
import comfy.utils
import comfy.weight_adapter
import torch
from torch import Tensor, nn

from ..iteris_core.bases import Base, describe_base
from ..iteris_core.calibration import Calibration, Concept, concept_prompts
from ..iteris_core.errors import IterisError, LoraFileError
from ..iteris_core.hosts import Stage, Tick
from ..iteris_core.hosts.streams import unet_streams
from ..iteris_core.lockstep import Lockstep, MicroBatch
from ..iteris_core.lora import Lora, LowRank, concatenate
from ..iteris_core.lora_files.tensors import file_digest, read_tensors
from .peft_alphas import with_alphas

_LATENT_SIDE = 64
Conditioning = tuple[Tensor, dict[str, Any]]


@dataclass(frozen=True)
class ComfySamples:
    """Rows of the denoiser, sorted by concept, as in the diffusers host.

    ``text_owners`` and ``tokens`` list the distinct (concept, prompt) pairs; ``text_rows`` says
    which of them a row uses. ``latents`` are on ComfyUI's scale of ``sigmas``; both are None where
    no site needs the denoiser to run.
    """

    text_owners: Sequence[int]
    tokens: Sequence[Any]
    owners: Sequence[int]
    text_rows: Sequence[int]
    latents: Tensor | None
    sigmas: Tensor | None


class ComfyHost:
    """Use as a context manager: leaving it gives MODEL and CLIP back as ComfyUI expects them.

    ``batch`` is the number of rows per forward while samples are made.
    """

    def __init__(self, model: Any, clip: Any, batch: int = 16) -> None:
        if getattr(clip, "use_clip_schedule", False) and clip.patcher.forced_hooks is not None:
            raise IterisError(
                "The CLIP has a hook schedule, whose weights change over the steps; connect the "
                "CLIP from before Set CLIP Hooks."
            )
        self.model, self.clip, self.batch = model, clip, batch
        key_map = comfy.lora.model_lora_keys_unet(model.model, {})
        key_map = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, key_map)
        self._key_map = _with_missing_names(key_map)
        self._names = _site_names(model, clip, set(map(_weight_key, key_map.values())))
        self._sites = {site: self._module(key) for key, site in self._names.items()}
        self._base = _known_base(model, self._sites)
        self._encoders = {
            name: module
            for name, module in clip.cond_stage_model.named_modules()
            if isinstance(module, comfy.sd1_clip.SDClipModel)
        }
        self._lockstep: Lockstep | None = None
        self._options: dict[str, Any] | None = None

    def __enter__(self) -> ComfyHost:
        return self

    def __exit__(self, *_: object) -> None:
        for encoder in self._encoders.values():
            encoder.__dict__.pop("encode", None)
        if self._options is not None:
            self.model.cleanup()
            comfy.samplers.cast_to_load_options(self._options, device=self.model.offload_device)
            self.model.restore_hook_patches()
            self._options = None

    def sites(self) -> Mapping[str, nn.Module]:
        return self._sites

    def read_lora(self, path: str | Path) -> Lora:
        """Any file that ComfyUI reads, and those of diffusers that it reads only in part."""
        path = Path(path)
        tensors, metadata = read_tensors(path)
        state = comfy.lora_convert.convert_lora(with_alphas(path, tensors, metadata))
        loaded = comfy.lora.load_lora(state, self._key_map, log_missing=False)
        used: set[str] = set()
        parts: dict[str, list[LowRank]] = {}
        for target, adapter in loaded.items():
            used |= set(getattr(adapter, "loaded_keys", ()))
            key = _weight_key(target)
            if key not in self._names:
                raise LoraFileError(f"{path}: {key} is no linear layer or 2D convolution.")
            site = self._names[key]
            module = self._sites[site]
            parts.setdefault(site, []).append(_low_rank(path, site, target, adapter, module))
        unread = [key for key in state if key not in used and not key.endswith(".alpha")]
        if unread:
            raise LoraFileError(
                f"{path}: {len(unread)} of {len(state)} keys match nothing in this MODEL and CLIP, "
                f"such as {unread[0]} {tuple(state[unread[0]].shape)}; was the LoRA made for "
                "another base model?"
            )
        sites = {site: concatenate(some) for site, some in parts.items()}
        return Lora(sites, path.stem, metadata, str(path), file_digest(path), self._base)

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        counts: list[int] = []
        for prompt in prompts:
            name, sections = next(iter(self.clip.tokenize(prompt).items()))
            end = self._encoder_of(name).special_tokens.get("end")
            found = [[token for token, *_ in section] for section in sections]
            counts.append(sum(some.index(end) + 1 if end in some else len(some) for some in found))
        return counts

    def samples(
        self,
        concepts: Sequence[Concept],
        sites: Set[str],
        calibration: Calibration,
        lockstep: Lockstep,
        generator: torch.Generator,
        tick: Tick,
    ) -> ComfySamples:
        self._lockstep = lockstep
        prompts = [concept_prompts(concept, calibration, generator) for concept in concepts]
        denoises = self._needs_denoiser(sites)
        if not denoises and calibration.empty_share:
            prompts = [[*some, ""] for some in prompts]
        owners = [i for i, some in enumerate(prompts) for _ in some]
        flat = [prompt for some in prompts for prompt in some]
        if not denoises:
            return self._rows(owners, flat, None, None)

        latents, sigmas = self._latents(owners, flat, sites, calibration, generator, tick)
        count = sigmas.shape[1]
        row_owners = [owner for owner in owners for _ in range(count)]
        row_prompts = [prompt for prompt in flat for _ in range(count)]
        empty = torch.rand(len(row_owners), generator=generator) < calibration.empty_share
        for row in empty.nonzero().flatten().tolist():
            row_prompts[row] = ""
        return self._rows(row_owners, row_prompts, latents.flatten(0, 1), sigmas.flatten())

    def forward(self, samples: Any, rows: Sequence[int]) -> Tensor:
        raise IterisError(
            "ComfyUI loads weights in inference mode, which keeps no gradients, so a merge cannot "
            "be polished there; set polish_steps to 0."
        )

    def streams(self, sites: Set[str]) -> Mapping[str, nn.Module]:
        if not self._needs_denoiser(sites):
            return {}
        return unet_streams(self.model.model.diffusion_model, self._sites)

    def stages(self, samples: ComfySamples, sites: Set[str]) -> Iterator[Stage]:
        batches = self._text_batches(samples, sites)
        self._load_clip()
        for batch in batches.values():
            if batch.sites:
                yield Stage(f"text encoder {batch.name}", batch.sites, batch.owners, batch.run)
            else:
                batch.run_all(self.batch)
        if not self._needs_denoiser(sites):
            return
        conditionings = [
            self._assemble(samples, batches, copy)
            for copy in range(2)
            if all(batch.has(copy) for batch in batches.values())
        ]
        assert samples.latents is not None
        assert samples.sigmas is not None
        latents, sigmas = samples.latents, samples.sigmas
        self._load_model(latents.shape, [c for some in conditionings for c in some])

        def run(rows: Sequence[int], copies: int) -> None:
            index = torch.as_tensor(list(rows) * copies)
            texts = [
                conditionings[copy][samples.text_rows[row]]
                for copy in range(copies)
                for row in rows
            ]
            self._predict(latents[index], sigmas[index], texts)

        names = [site for site in sites if not site.startswith("text_encoder")]
        yield Stage("denoiser", names, samples.owners, run)

    def _needs_denoiser(self, sites: Set[str]) -> bool:
        return any(not site.startswith("text_encoder") for site in sites)

    def _module(self, key: str) -> nn.Module:
        root = self.model.model if key.startswith("diffusion_model.") else self._text_model
        return root.get_submodule(key.removesuffix(".weight"))

    @property
    def _text_model(self) -> Any:
        return self.clip.cond_stage_model

    def _rows(
        self, owners: Sequence[int], prompts: Sequence[str], latents: Any, sigmas: Any
    ) -> ComfySamples:
        keys = list(zip(owners, prompts, strict=True))
        pairs = {pair: index for index, pair in enumerate(dict.fromkeys(keys))}
        return ComfySamples(
            [owner for owner, _ in pairs],
            self._tokenize([prompt for _, prompt in pairs]),
            owners,
            [pairs[pair] for pair in keys],
            latents,
            sigmas,
        )

    # Text encoders

    def _tokenize(self, prompts: Sequence[str]) -> list[Any]:
        """Tokens of every prompt; encoders that do not pad get the longest prompt's length."""
        tokens = [self.clip.tokenize(prompt) for prompt in prompts]
        lengths = {
            name: {len(section) for some in tokens for section in some[name]} for name in tokens[0]
        }
        ragged = {name: max(found) for name, found in lengths.items() if len(found) > 1}
        if not ragged:
            return tokens
        options = {f"{name}_min_length": length for name, length in ragged.items()}
        return [self.clip.tokenize(prompt, tokenizer_options=options) for prompt in prompts]

    def _encoder_of(self, name: str) -> Any:
        for found in (f"clip_{name}", name):
            if found in self._encoders:
                return self._encoders[found]
        return next(iter(self._encoders.values()))

    def _text_batches(self, samples: ComfySamples, sites: Set[str]) -> dict[str, _TextBatch]:
        batches: dict[str, _TextBatch] = {}
        for name, encoder in self._encoders.items():
            prefix = f"{name}."
            own = [
                site
                for key, site in self._names.items()
                if site in sites and key.startswith(prefix)
            ]
            rows: dict[tuple[int, tuple[int, ...]], list[Any]] = {}
            for owner, tokens in zip(samples.text_owners, samples.tokens, strict=True):
                for key in (name, name.removeprefix("clip_")):
                    for section in _sections(encoder, tokens.get(key, ())):
                        rows.setdefault((owner if own else -1, _key(section)), section)
            ordered = dict(sorted(rows.items(), key=lambda item: item[0][0]))
            batches[name] = _TextBatch(name, encoder, own, ordered)
        return batches

    def _load_clip(self) -> None:
        """What ``CLIP.encode_from_tokens`` does before it encodes."""
        self._text_model.reset_clip_options()
        if self.clip.layer_idx is not None:
            self._text_model.set_clip_options({"layer": self.clip.layer_idx})
        with torch.inference_mode():
            memory.load_models_gpu([self.clip.patcher])
        self._text_model.set_clip_options({"execution_device": self.clip.patcher.load_device})

    def _assemble(
        self, samples: ComfySamples, batches: Mapping[str, _TextBatch], copy: int
    ) -> list[Conditioning]:
        """The conditioning of every pair, from what the text encoders gave."""
        found: list[Conditioning] = []
        for owner, tokens in zip(samples.text_owners, samples.tokens, strict=True):
            with self._serving(batches, copy, owner):
                cond, extra = self.clip.encode_from_tokens_scheduled(tokens, show_pbar=False)[0]
            found.append((cond, extra))
        return found

    @contextmanager
    def _serving(self, batches: Mapping[str, _TextBatch], copy: int, owner: int) -> Iterator[None]:
        """Text encoders answer with what they gave in their batch."""
        try:
            for batch in batches.values():
                batch.encoder.encode = self._answer(batch, copy, owner)
            yield
        finally:
            for batch in batches.values():
                batch.encoder.__dict__.pop("encode", None)

    def _answer(self, batch: _TextBatch, copy: int, owner: int) -> Callable[[list[Any]], Any]:
        def encode(sections: list[Any]) -> Any:
            found = batch.find(copy, owner, sections)
            if found is None:  # a composite that changes the tokens on their way
                outputs: list[Any] = []
                owners, merged = [owner] * len(sections), copy == 1
                assert self._lockstep is not None
                self._lockstep.run(
                    MicroBatch(
                        lambda: outputs.append(batch.encoder(sections)),
                        owners,
                        1,
                        merged_only=merged,
                    )
                )
                return outputs[0]
            return found

        return encode

    # Denoiser

    def _load_model(self, shape: Sequence[int], texts: Sequence[Conditioning]) -> None:
        """What ``CFGGuider`` does before it samples."""
        if self._options is None:
            conds = {"positive": comfy.sampler_helpers.convert_cond([list(c) for c in texts[:1]])}
            options = comfy.model_patcher.create_model_options_clone(self.model.model_options)
            comfy.sampler_helpers.prepare_model_patcher(self.model, conds, options)
            self._options = options
        needed = self.model.model.memory_required([2 * self.batch, *shape[1:]])
        with torch.inference_mode():
            memory.load_models_gpu(
                [self.model, *self.model.get_nested_additional_models()], memory_required=needed
            )
        device, dtype = self.model.load_device, self.model.model_dtype()
        comfy.samplers.cast_to_load_options(self._options, device=device, dtype=dtype)
        self.model.pre_run()

    def _predict(self, latents: Tensor, sigmas: Tensor, texts: Sequence[Conditioning]) -> Tensor:
        """The denoised latents of every row; one forward, rows in order."""
        device = self.model.load_device
        latents, sigmas = latents.to(device), sigmas.to(device)
        conds = comfy.sampler_helpers.convert_cond([list(_stack(texts))])
        conds = comfy.samplers.encode_model_conds(
            self.model.model.extra_conds,
            conds,
            latents,
            device,
            "positive",
            latent_image=torch.zeros_like(latents),
            denoise_mask=None,
            seed=None,
            latent_shapes=[latents.shape],
        )
        return comfy.samplers.calc_cond_batch(
            self.model.model, [conds], latents, sigmas, self._options
        )[0]

    def _latents(
        self,
        owners: list[int],
        prompts: list[str],
        sites: Set[str],
        calibration: Calibration,
        generator: torch.Generator,
        tick: Tick,
    ) -> tuple[Tensor, Tensor]:
        """Latents (prompts, T, …) and their sigmas (prompts, T)."""
        steps, wanted = calibration.denoising_steps, calibration.timesteps
        sampling = self.model.get_model_object("model_sampling")
        scheduler = "simple" if isinstance(sampling, comfy.model_sampling.CONST) else "ddim_uniform"
        schedule = comfy.samplers.calculate_sigmas(sampling, scheduler, steps).float().cpu()
        steps = len(schedule) - 1
        shape = self._latent_shape(calibration.latent_size or _LATENT_SIDE)
        noise = torch.randn(len(prompts), *shape, generator=generator)
        picks = torch.stack(
            [torch.randperm(steps, generator=generator)[:wanted] for _ in prompts]
        ).sort(dim=1)[0]
        kept = torch.empty(len(prompts), picks.shape[1], *shape)

        def start(sigma: Tensor, rows: Tensor) -> Tensor:
            return sampling.noise_scaling(sigma.cpu(), rows, torch.zeros_like(rows), True)

        if calibration.latents == "noise":
            for slot in range(picks.shape[1]):
                for row, pick in enumerate(picks[:, slot].tolist()):
                    kept[row, slot] = start(schedule[pick], noise[row : row + 1])[0]
            return kept, schedule[picks]

        guided = calibration.guidance > 1
        texts, empties = self._texts_alone(owners, prompts, sites, tick)
        self._load_model(noise.shape, texts)
        chunks = [range(n, min(n + self.batch, len(prompts)))
                  for n in range(0, len(prompts), self.batch)]  # fmt: skip
        for done, rows in enumerate(chunks):
            tick("denoising samples", done, len(chunks))
            some = list(rows)
            chunk_texts = [texts[row] for row in some]
            chunk_owners = [owners[row] for row in some]
            if guided:
                chunk_texts += [empties[owner] for owner in chunk_owners]
                chunk_owners *= 2
            x = start(schedule[0], noise[some]).to(self.model.load_device)
            for step in range(steps):
                row, slot = (picks[some] == step).nonzero(as_tuple=True)
                kept[row + rows.start, slot] = x[row.to(x.device)].to("cpu", kept.dtype)
                sigma, following = float(schedule[step]), float(schedule[step + 1])
                denoised = self._denoise(x, sigma, chunk_texts, chunk_owners)
                if guided:
                    positive, negative = denoised.chunk(2)
                    denoised = negative + calibration.guidance * (positive - negative)
                # Euler on this scale of latents is DDIM without noise.
                x = x + (x - denoised) / sigma * (following - sigma)
                memory.throw_exception_if_processing_interrupted()
        tick("denoising samples", len(chunks), len(chunks))
        return kept, schedule[picks]

    def _denoise(
        self, x: Tensor, sigma: float, texts: Sequence[Conditioning], owners: Sequence[int]
    ) -> Tensor:
        """One forward with each row's own LoRA."""
        batch = torch.cat([x] * (len(owners) // len(x)))
        sigmas = torch.full((len(batch),), sigma)
        found: list[Tensor] = []
        assert self._lockstep is not None
        self._lockstep.run(
            MicroBatch(lambda: found.append(self._predict(batch, sigmas, texts)), owners, 1)
        )
        return found[0]

    def _texts_alone(
        self, owners: list[int], prompts: list[str], sites: Set[str], tick: Tick
    ) -> tuple[list[Conditioning], list[Conditioning]]:
        """The conditioning of every row with its own LoRA active, and each concept's empty one."""
        count = max(owners) + 1
        rows = self._rows([*owners, *range(count)], [*prompts, *[""] * count], None, None)
        self._load_clip()
        batches = self._text_batches(rows, sites)
        assert self._lockstep is not None
        for batch in batches.values():
            for start in range(0, len(batch.owners), self.batch):
                some = range(start, min(start + self.batch, len(batch.owners)))
                tick("encoding prompts", some.stop, len(batch.owners))
                if batch.sites:
                    own = [batch.owners[row] for row in some]
                    run = MicroBatch(lambda b=batch, s=some: b.run(s, 1), own, 1)
                    self._lockstep.run(run)
                else:
                    batch.run(some, 1)
        pairs = self._assemble(rows, batches, 0)
        found = [pairs[row] for row in rows.text_rows]
        return found[: len(owners)], found[len(owners) :]

    def _latent_shape(self, side: int) -> tuple[int, ...]:
        empty = torch.zeros(1, 4, side, side)
        return tuple(comfy.sample.fix_empty_latent_channels(self.model, empty).shape[1:])


def apply_lora(model: Any, clip: Any, lora: Mapping[str, Tensor]) -> tuple[Any, Any]:
    """MODEL and CLIP with a LoRA at strength 1, as the stock loader does it, but nothing lost."""
    key_map = comfy.lora.model_lora_keys_unet(model.model, {})
    key_map = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, key_map)
    loaded = comfy.lora.load_lora(lora, key_map)
    model, clip = model.clone(), clip.clone()
    patched = {*model.add_patches(loaded), *clip.add_patches(loaded)}
    modules = sum(key.endswith(".alpha") for key in lora)
    if len(patched) != len(loaded) or len(loaded) != modules:
        raise IterisError(
            f"Only {len(patched)} of {modules} changes of the LoRA fit this MODEL and CLIP."
        )
    return model, clip


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def free_memory() -> None:
    memory.soft_empty_cache()


def show_progress(node_id: str | None) -> Callable[[str, int, int], None]:
    """A callback that draws the node's progress bar and raises when the user interrupts."""
    shown: list[str] = []

    def on_progress(what: str, done: int, total: int) -> None:
        memory.throw_exception_if_processing_interrupted()
        if shown[-1:] != [what]:
            shown.append(what)
            show_text(f"{what[0].upper()}{what[1:]} …", node_id)
        comfy.utils.ProgressBar(max(total, 1), node_id).update_absolute(done)

    return on_progress


def show_text(text: str, node_id: str | None) -> None:
    """Text on the node itself, while there is a server to show it."""
    if node_id is not None:
        from server import PromptServer

        PromptServer.instance.send_progress_text(text, node_id)


class _TextBatch:
    """The distinct token lists of one text encoder, and what it gave for them."""

    def __init__(
        self,
        name: str,
        encoder: Any,
        sites: Sequence[str],
        rows: Mapping[tuple[int, tuple[int, ...]], list[Any]],
    ) -> None:
        self.name, self.encoder, self.sites = name, encoder, sites
        self._keys, self._tokens = list(rows), list(rows.values())
        self.owners = [owner for owner, _ in rows]
        self._found: list[dict[Any, Any]] = [{}, {}]

    def run(self, rows: Sequence[int], copies: int) -> None:
        outputs = type(self.encoder).encode(
            self.encoder, [self._tokens[row] for row in rows] * copies
        )
        for copy in range(copies):
            for index, row in enumerate(rows):
                at = copy * len(rows) + index
                self._found[copy][self._keys[row]] = _slice(outputs, at)

    def run_all(self, size: int) -> None:
        """An encoder that no LoRA changes gives the same for everybody."""
        with torch.no_grad():
            for start in range(0, len(self.owners), size):
                self.run(range(start, min(start + size, len(self.owners))), 1)
        self._found[1] = self._found[0]

    def has(self, copy: int) -> bool:
        return bool(self._found[copy]) or not self._keys

    def find(self, copy: int, owner: int, sections: list[Any]) -> Any:
        keys = [(owner if self.sites else -1, _key(section)) for section in sections]
        if any(key not in self._found[copy] for key in keys):
            return None
        return _join([self._found[copy][key] for key in keys])


def _sections(encoder: Any, pairs: Sequence[Any]) -> list[list[Any]]:
    """The token lists that ``encode_token_weights`` hands to ``encode``."""
    sections = [[token for token, *_ in section] for section in pairs]
    if sections and any(weight != 1.0 for section in pairs for _, weight, *_ in section):
        length = max(len(section) for section in sections)
        make = getattr(encoder, "gen_empty_tokens", comfy.sd1_clip.gen_empty_tokens)
        sections.append(make(encoder.special_tokens, length))
    return sections


def _key(section: Sequence[Any]) -> tuple[int, ...]:
    """Tokens are numbers or, in embeddings, tensors."""
    return tuple(token if isinstance(token, int) else id(token) for token in section)


def _slice(outputs: Any, at: int) -> Any:
    """Row ``at`` of (states, pooled or None[, extras])."""
    where = memory.intermediate_device()
    states, pooled, *extra = outputs
    return (
        states[at : at + 1].to(where),
        None if pooled is None else pooled[at : at + 1].to(where),
        *({key: value[at : at + 1] for key, value in some.items()} for some in extra),
    )


def _join(rows: Sequence[Any]) -> Any:
    states, pooled, *extra = zip(*rows, strict=True)
    return (
        torch.cat(states),
        None if pooled[0] is None else torch.cat(pooled),
        *({key: torch.cat([e[key] for e in some]) for key in some[0]} for some in extra),
    )


def _stack(texts: Sequence[Conditioning]) -> Conditioning:
    """One conditioning of as many rows; shorter ones repeat, as ComfyUI's own batches do."""
    length = math.lcm(*(cond.shape[1] for cond, _ in texts))
    cond = torch.cat([cond.repeat(1, length // cond.shape[1], 1) for cond, _ in texts])
    extra = dict(texts[0][1])
    for key, value in extra.items():
        if isinstance(value, Tensor):
            extra[key] = torch.cat([other[key] for _, other in texts])
    return cond, extra


def _weight_key(target: Any) -> str:
    return target if isinstance(target, str) else target[0]


def _with_missing_names(key_map: dict[str, Any]) -> dict[str, Any]:
    """Names that today's diffusers and transformers write and ComfyUI's maps lack."""
    added: dict[str, Any] = {}
    for name, target in key_map.items():
        if ".processor.to_" in name:
            plain = name.replace(".processor.to_", ".to_")
            added[f"{plain}.0" if plain.endswith(".to_out") else plain] = target
        if name.startswith("text_encoder") and ".text_model." in name:
            added[name.replace(".text_model.", ".", 1)] = target
    return {**added, **key_map}


def _site_names(model: Any, clip: Any, keys: set[str]) -> dict[str, str]:
    """Weight key → site, for every linear layer and 2D convolution that a LoRA can name.

    A UNet's sites have diffusers' names, other denoisers' their own, which is what a kohya file
    calls them.
    """
    unet = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    named = {f"diffusion_model.{ours}": theirs for theirs, ours in unet.items()}
    encoders = [name for name, _ in clip.cond_stage_model.named_children()]
    order = [name for name in ("clip_l", "clip_h", "clip_g") if name in encoders]
    order += [name for name in encoders if name not in order]
    names: dict[str, str] = {}
    for key in sorted(keys):
        in_unet = key.startswith("diffusion_model.")
        root = model.model if in_unet else clip.cond_stage_model
        if not key.endswith(".weight") or not _is_site(root, key.removesuffix(".weight")):
            continue
        if in_unet:
            name = f"unet.{named.get(key, key.removeprefix('diffusion_model.'))}"
        else:
            encoder, _, rest = key.partition(".")
            number = order.index(encoder) + 1
            component = "text_encoder" if number == 1 else f"text_encoder_{number}"
            name = f"{component}.{rest.removeprefix('transformer.')}"
        names[key] = name.removesuffix(".weight")
    return names


def _known_base(model: Any, sites: Mapping[str, Any]) -> Base | None:
    """What the file writer takes a UNet's names from; other denoisers' are kohya's already."""
    if not comfy.utils.unet_to_diffusers(model.model.model_config.unet_config):
        return None
    return describe_base({site: _shape(module) for site, module in sites.items()})


def _shape(module: Any) -> tuple[int, ...]:
    """Of the weight, which may be stored in another shape where it is quantised."""
    if isinstance(module, nn.Conv2d):
        return (module.out_channels, module.in_channels, *module.kernel_size)
    return (module.out_features, module.in_features)


def _is_site(root: nn.Module, path: str) -> bool:
    try:
        module = root.get_submodule(path)
    except AttributeError:
        return False
    # Quantised layers are no nn.Linear, but say how wide they are.
    return isinstance(module, nn.Conv2d) or hasattr(module, "in_features")


def _low_rank(path: Path, site: str, target: Any, adapter: Any, module: Any) -> LowRank:
    if not isinstance(adapter, comfy.weight_adapter.LoRAAdapter):
        kind = getattr(adapter, "name", "a full weight difference")
        raise LoraFileError(f"{path}: site {site} is {kind}; only plain LoRAs can be merged here.")
    up, down, alpha, mid, dora, reshape = adapter.weights
    for part, kind in ((mid, "a Tucker core"), (dora, "DoRA"), (reshape, "a reshaped weight")):
        if part is not None:
            raise LoraFileError(f"{path}: site {site} has {kind}, which cannot be merged here.")
    out, width, *window = _shape(module)
    kernel, shape = tuple(window) or None, (out, width * math.prod(window))
    up, down = up.flatten(1).float(), down.flatten(1).float()
    scale = 1.0 if alpha is None else float(alpha) / down.shape[0]
    if not isinstance(target, str):
        up, down = _whole(target, up, down, shape)
    if (up.shape[0], down.shape[1]) != shape or up.shape[1] != down.shape[0]:
        raise LoraFileError(
            f"{path}: site {site} has down {tuple(down.shape)} and up {tuple(up.shape)}, but the "
            f"base model's layer there is {shape}; the LoRA was made for another base model."
        )
    return LowRank(up * scale, down, kernel)


def _whole(
    target: tuple[Any, ...], up: Tensor, down: Tensor, shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Factors of a whole weight from those of a slice of it, such as q in a fused qkv."""
    offset = target[1]
    if len(target) > 2 and target[2] is not None:
        up = target[2](up)
    if offset is None:
        return up, down
    dim, start, length = offset
    sliced = up if dim == 0 else down
    if sliced.shape[dim] != length:
        return up, down  # its shape is complained of by the caller
    end = shape[dim] - start - length
    pad = nn.functional.pad
    return (pad(up, (0, 0, start, end)), down) if dim == 0 else (up, pad(down, (start, end)))


def scoring_device() -> torch.device:
    return memory.get_torch_device()

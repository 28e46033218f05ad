"""LoRA files as the trainers write them, spelled out here independently of the package.

Every function gives (tensors, metadata) for a LoRA whose factors are taken as they are, at
``alpha`` over rank.
"""

import json

import torch

from iteris_core import Lora

SGM = {
    "conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}  # fmt: skip
FLUX_DOUBLE = {
    "attn_to_out_0": "img_attn_proj", "attn_to_add_out": "txt_attn_proj",
    "ff_net_0_proj": "img_mlp_0", "ff_net_2": "img_mlp_2", "ff_context_net_0_proj": "txt_mlp_0",
    "ff_context_net_2": "txt_mlp_2", "norm1_linear": "img_mod_lin",
    "norm1_context_linear": "txt_mod_lin",
}  # fmt: skip
SD3_JOINT = {
    "attn_to_out_0": "x_block_attn_proj", "attn_to_add_out": "context_block_attn_proj",
    "attn2_to_out_0": "x_block_attn2_proj", "ff_net_0_proj": "x_block_mlp_fc1",
    "ff_net_2": "x_block_mlp_fc2", "ff_context_net_0_proj": "context_block_mlp_fc1",
    "ff_context_net_2": "context_block_mlp_fc2", "norm1_linear": "x_block_adaLN_modulation_1",
    "norm1_context_linear": "context_block_adaLN_modulation_1",
}  # fmt: skip


def shaped(change, dtype):
    up, down = change.up.to(dtype), change.down.to(dtype)
    if change.kernel:
        up, down = up[:, :, None, None], down.reshape(change.rank, -1, *change.kernel)
    return up.contiguous(), down.contiguous()


def split(site):
    component, _, path = site.partition(".")
    return component, path


def sgm_name(path, layers):
    """Name of a UNet module in the original code, for ``layers`` resnets per down block."""
    parts = path.split(".")
    if parts[0] == "mid_block":
        number = {"resnets0": 0, "attentions0": 1, "resnets1": 2}[parts[1] + parts[2]]
        return f"middle_block.{number}." + SGM.get(parts[3], ".".join(parts[3:]))
    if parts[0] in ("down_blocks", "up_blocks"):
        block, kind, layer = int(parts[1]), parts[2], int(parts[3])
        index = block * (layers + 1) + layer + (parts[0] == "down_blocks")
        side = "input_blocks" if parts[0] == "down_blocks" else "output_blocks"
        if kind == "resnets":
            return f"{side}.{index}.0." + SGM[parts[4]]
        return f"{side}.{index}.1." + ".".join(parts[4:])
    return {"time_embedding.linear_1": "time_embed.0"}[path]


def text_prefix(kind, component):
    if kind == "sd1":
        return "lora_te"
    return {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2" if kind != "flux" else
            "lora_te3", "text_encoder_3": "lora_te3"}[component]  # fmt: skip


def fuse(lora: Lora, sites, dtype, width=0):
    """Stack q, k and v (and more): block-diagonal up, stacked down."""
    changes = [lora.sites[site] for site in sites]
    up = torch.block_diag(*[c.up for c in changes]).to(dtype)
    return up.contiguous(), torch.cat([c.down for c in changes]).to(dtype)


def fused_names(lora: Lora, kind: str):
    """Underscored original name → the sites in it, for FLUX and SD 3 transformers."""
    groups: dict[str, list[str]] = {}
    for site in lora.sites:
        component, path = split(site)
        if component != "transformer":
            continue
        block, number, rest = path.split(".", 2) if path[0] in "st" else ("", "", path)
        rest = rest.replace(".", "_")
        image, text = ("img_attn_qkv", "txt_attn_qkv")
        head, table = f"double_blocks_{number}_", FLUX_DOUBLE
        if kind == "sd3":
            image, text = "x_block_attn_qkv", "context_block_attn_qkv"
            head, table = f"joint_blocks_{number}_", SD3_JOINT
        if not block:
            name = {"proj_out": "final_layer_linear"}[path]
        elif block == "single_transformer_blocks":
            inner = {"proj_out": "linear2", "norm_linear": "modulation_lin"}.get(rest, "linear1")
            name = f"single_blocks_{number}_{inner}"
        elif rest in ("attn_to_q", "attn_to_k", "attn_to_v"):
            name = head + image
        elif rest in ("attn2_to_q", "attn2_to_k", "attn2_to_v"):
            name = head + "x_block_attn2_qkv"
        elif rest.startswith("attn_add_"):
            name = head + text
        else:
            name = head + table[rest]
        groups.setdefault(name, []).append(site)
    order = ("to_q", "add_q_proj", "to_k", "add_k_proj", "to_v", "add_v_proj", "proj_mlp")
    for sites in groups.values():
        if len(sites) > 1:
            sites.sort(key=lambda site: order.index(site.rpartition(".")[2]))
    return groups


def kohya(lora, kind, alpha=None, dtype=torch.float32, sgm=False, layers=2):
    tensors = {}

    def put(name, up, down):
        tensors[f"{name}.lora_up.weight"] = up
        tensors[f"{name}.lora_down.weight"] = down
        if alpha is not None:
            # The scale stays alpha over the sites' own rank where modules are fused.
            fused = down.shape[0] / next(iter(lora.sites.values())).rank
            tensors[f"{name}.alpha"] = torch.tensor(float(alpha * fused))

    for site, change in lora.sites.items():
        component, path = split(site)
        if component == "unet":
            name = sgm_name(path, layers) if sgm else path
            put(f"lora_unet_{name.replace('.', '_')}", *shaped(change, dtype))
        elif component.startswith("text"):
            put(f"{text_prefix(kind, component)}_{path.replace('.', '_')}", *shaped(change, dtype))
    for name, sites in fused_names(lora, kind).items():
        put(f"lora_unet_{name}", *fuse(lora, sites, dtype))
    return tensors, {}


def kohya_sgm(lora, kind, alpha=None, dtype=torch.float32):
    return kohya(lora, kind, alpha, dtype, sgm=True)


def peft(lora, kind, alpha=None, dtype=torch.float32, text_model=True):
    tensors, config = {}, {}
    for site, change in lora.sites.items():
        component, path = split(site)
        up, down = shaped(change, dtype)
        name = site if text_model else site.replace(".text_model.", ".")
        tensors |= {f"{name}.lora_B.weight": up, f"{name}.lora_A.weight": down}
        config[f"{component}.r"] = change.rank
        config[f"{component}.lora_alpha"] = alpha
        path = path.removeprefix("text_model.")
        config.setdefault(f"{component}.target_modules", []).append(path)
    return tensors, {} if alpha is None else {"lora_adapter_metadata": json.dumps(config)}


def peft_new(lora, kind, alpha=None, dtype=torch.float32):
    return peft(lora, kind, alpha, dtype, text_model=False)


def peft_raw(lora, kind, alpha=None, dtype=torch.float32):
    """What peft's own ``get_peft_model`` calls the modules."""
    tensors, metadata = peft(lora, kind, alpha, dtype)
    marked = {}
    for key, tensor in tensors.items():
        component, path = split(key)
        marked[f"{component}.base_model.model.{path}"] = tensor
    return marked, metadata


def diffusers_old(lora, kind, alpha=None, dtype=torch.float32):
    assert alpha is None
    tensors = {}
    for site, change in lora.sites.items():
        up, down = shaped(change, dtype)
        name = site + ".lora"
        if site.startswith("text"):
            name = site + ".lora_linear_layer"
        elif ".to_" in site:
            head, _, leaf = site.rpartition(".to_")
            name = f"{head}.processor.to_{leaf.removesuffix('.0')}_lora"
        tensors |= {f"{name}.up.weight": up, f"{name}.down.weight": down}
    return tensors, {}


def diffusers_oldest(lora, kind, alpha=None, dtype=torch.float32):
    """Attention of the UNet only, and no component in the names."""
    tensors, _ = diffusers_old(lora, kind, alpha, dtype)
    return {k.removeprefix("unet."): v for k, v in tensors.items() if ".processor." in k}, {}


def onetrainer(lora, kind, alpha=None, dtype=torch.float32):
    tensors = {}
    for site, change in lora.sites.items():
        component, path = split(site)
        up, down = shaped(change, dtype)
        prefix = "lora_transformer" if component == "transformer" else "lora_unet"
        if component.startswith("text"):
            number = {"text_encoder": 1, "text_encoder_2": 2, "text_encoder_3": 3}[component]
            prefix = "lora_te" if kind == "sd1" else f"lora_te{number}"
        name = f"{prefix}_{path.replace('.', '_')}"
        tensors |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
        tensors[f"{name}.alpha"] = torch.tensor(float(alpha if alpha else change.rank))
    return tensors, {}


def simpletuner(lora, kind, alpha=None, dtype=torch.float32):
    tensors, _ = onetrainer(lora, kind, alpha, dtype)
    return {
        k.replace("lora_transformer", "lycoris").replace("lora_unet", "lycoris"): v
        for k, v in tensors.items()
    }, {}


def dotted(name: str) -> str:
    """An underscored original name with its dots back."""
    for word in ("double_blocks", "single_blocks", "joint_blocks", "img_attn", "txt_attn",
                 "img_mlp", "txt_mlp", "img_mod", "txt_mod", "x_block", "context_block",
                 "adaLN_modulation", "final_layer"):  # fmt: skip
        name = name.replace(word, word.replace("_", "§"))
    return name.replace("_", ".").replace("§", "_")


def original(lora, kind, alpha=None, dtype=torch.float32, prefix="diffusion_model."):
    """ai-toolkit's and ComfyUI's: the original code's dotted names, lora_A and lora_B."""
    assert alpha is None
    modules = {
        prefix + dotted(name): fuse(lora, sites, dtype)
        for name, sites in fused_names(lora, kind).items()
    }
    encoders = {"text_encoder": "clip_l", "text_encoder_3": "t5xxl",
                "text_encoder_2": "t5xxl" if kind == "flux" else "clip_g"}  # fmt: skip
    for site, change in lora.sites.items():
        component, path = split(site)
        if component == "unet":
            layers = {"sd1": 1, "sdxl": 2}[kind]
            modules[prefix + sgm_name(path, layers)] = shaped(change, dtype)
        elif component in encoders:
            module = f"text_encoders.{encoders[component]}.transformer.{path}"
            modules[module] = shaped(change, dtype)
    tensors = {f"{name}.lora_B.weight": up for name, (up, _) in modules.items()}
    return tensors | {f"{name}.lora_A.weight": down for name, (_, down) in modules.items()}, {}


def bfl(lora, kind, alpha=None, dtype=torch.float32):
    return original(lora, kind, alpha, dtype, prefix="")


def xlabs(lora, kind, alpha=None, dtype=torch.float32):
    tensors = {}
    names = {"img_attn.qkv": "qkv_lora1", "txt_attn.qkv": "qkv_lora2", "img_attn.proj":
             "proj_lora1", "txt_attn.proj": "proj_lora2", "linear1": "qkv_lora",
             "linear2": "proj_lora"}  # fmt: skip
    for name, sites in fused_names(lora, kind).items():
        module = dotted(name)
        for theirs, ours in names.items():
            if module.endswith(f".{theirs}"):
                stem = module.removesuffix(theirs) + f"processor.{ours}"
                chosen = [s for s in sites if "proj_mlp" not in s]
                up, down = fuse(lora, chosen, dtype)
                tensors |= {f"{stem}.up.weight": up, f"{stem}.down.weight": down}
    return tensors, {}

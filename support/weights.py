"""Weights from files: CLIP's as published, CAT-Seg's, and our own checkpoints. What is wrong with a
file, a flag or the network becomes a UserError that names it."""
import functools
import re
import warnings
import zipfile
from pathlib import Path

import huggingface_hub
import open_clip
import torch

from model import build as build_segmenter, clip_sizes
from support.errors import UserError, first_line, reading

NOT_PLAIN = {"custom_text", "multimodal_cfg", "timm_model_name", "attentional_pool",
             "hf_model_name", "hf_tokenizer_name", "no_causal_mask"}  # in open_clip's sizes
DAMAGED = "it is cut short, damaged or holds code"
CAT_SEG = {  # by the shape of the patch embedding's kernel, the CLIP of its published checkpoints
    (768, 3, 16, 16): "ViT-B-16-quickgelu", (1024, 3, 14, 14): "ViT-L-14-336-quickgelu"}
CAT_SEG_NAMES = {  # what in the names of its tensors gives way to what, in this order
    "sem_seg_head.predictor.transformer": "head",
    "sem_seg_head.predictor.clip_model": "text_encoder",
    "text_encoder.visual": "image_encoder.visual", "text_encoder.logit_scale": "logit_scale",
    "head.conv1": "head.embed", "head.head": "head.logit",
    "head.guidance_projection.0": "head.image_guidance",
    "text_guidance_projection.0": "text_guidance",
    r"decoder_guidance_projection.(\d).0": r"middle_guidance.\1",
    "upsample1": "head.middle_up.0", "upsample2": "head.middle_up.1",
    r"layers.(\d).swin_block": r"spatial.\1",
    r"block_1.(attn\.)?": "blocks.0.", r"block_2.(attn\.)?": "blocks.1.",
    "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2",
    r"layers.(\d).attention(.attention)?": r"classes.\1",
    "MLP": "mlp", "padding_tokens": "padding_token",
    "decoder1": "decoder.0", "decoder2": "decoder.1",
    "conv.double_conv.0": "conv1", "conv.double_conv.1": "norm1",
    "conv.double_conv.3": "conv2", "conv.double_conv.4": "norm2"}


def build(clip, pretrained, image_size=384, channels=128):
    """A Segmenter over a CLIP with published weights. Raises UserError before anything is built.
    clip: "tiny" or an open_clip ViT, such as "ViT-B-16-quickgelu". pretrained: one of open_clip's
    tags ("openai": downloaded once), a file with weights of that model, or None for random ones.
    image_size: side of the training crops. channels: width of the head, 128 in CAT-Seg."""
    sizes = None if ":" in clip else clip_sizes(clip)  # "hf-hub:..." would be read from the net
    if sizes is None:
        raise UserError(f"--clip {clip}: open_clip has no model of this name "
                        "(open_clip.list_models() lists them)")
    visual, text = sizes["vision_cfg"], sizes["text_cfg"]
    foreign = NOT_PLAIN & {*sizes, *visual, *text} or "pool_type" in text
    if foreign or not isinstance(visual["layers"], int):  # several layer counts: a ResNet
        raise UserError(f"--clip {clip}: only CLIP models with a plain ViT and CLIP's own text "
                        "encoder are supported")
    for flag, value in (("image-size", image_size), ("channels", channels)):
        if not 16 <= value <= 2048:
            raise UserError(f"--{flag} {value} should lie within 16..2048")
    if channels % 4 or any(n % max(1, n // 16) for n in (channels // 2, channels // 4)):
        raise UserError(f"--channels {channels} can't be divided among the head's groups: use a "
                        "multiple of 4 below 100, or of 64")
    side = visual["image_size"] if image_size % visual["patch_size"] else image_size
    grid = side // visual["patch_size"]
    if grid % 2 or image_size % grid:
        raise UserError(f"--image-size {image_size} with --clip {clip} gives {grid} x {grid} "
                        "patches; the head needs an even number that divides it")
    load_weights = None
    if pretrained is not None:
        load_weights = functools.partial(load_clip, find_clip(clip, pretrained), clip)
    return build_segmenter(clip, image_size, channels, load_weights)


def find_clip(clip, pretrained):
    """The path of the weights that --pretrained names, unless they are of the other activation."""
    tag = open_clip.get_pretrained_cfg(clip, pretrained)
    if not tag and not Path(pretrained).is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(clip)) or "none"
        raise UserError(f"--pretrained {pretrained}: neither a file nor one of open_clip's tags "
                        f"for {clip}: {tags}")
    quick = clip_sizes(clip).get("quick_gelu", False)
    # OpenAI alone published TorchScript; other files do not say what they were trained with
    trained_quick = tag.get("quick_gelu", False) if tag else quick or is_torchscript(pretrained)
    if trained_quick != quick:
        theirs, ours = ("QuickGELU", "GELU") if trained_quick else ("GELU", "QuickGELU")
        fitting = clip.removesuffix("-quickgelu") if quick else clip + "-quickgelu"
        raise UserError(f"--pretrained {pretrained} was trained with {theirs} and --clip {clip} "
                        f"computes {ours}: use --clip {fitting}")
    return download(tag, pretrained) if tag else pretrained


def download(tag, pretrained):
    """The path of weights in open_clip's list: from a cache, or by one attempt to download them."""
    repository = tag["hf_hub"].rstrip("/")
    url = tag.get("url") or f"https://huggingface.co/{repository}"
    for name in ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"):
        cached = huggingface_hub.try_to_load_from_cache(repository, name)
        if isinstance(cached, str):
            return cached
    by_openai = Path("~/.cache/clip", Path(url).name).expanduser().is_file()  # their own package
    try:
        if not by_openai:  # asks once; without a network, the download would do so for a minute
            huggingface_hub.file_exists(repository, name)
        return open_clip.download_pretrained(tag, prefer_hf_hub=not by_openai)
    except Exception as e:
        raise UserError(f"--pretrained {pretrained} could not be downloaded ({first_line(e)}): "
                        f"fetch {url} elsewhere and use --pretrained FILE") from e


def load_clip(path, clip, clip_model):
    """Fill an open_clip.model.CLIP from a file: OpenAI's archives, or what open_clip reads."""
    with reading(f"--pretrained {path}", f"weights of {clip}", DAMAGED):
        if not is_torchscript(path):
            open_clip.load_checkpoint(clip_model, path, strict=True, weights_only=True)
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated
            state = torch.jit.load(path, map_location="cpu").state_dict()
        for constant in ("input_resolution", "context_length", "vocab_size"):
            state.pop(constant, None)
        clip_model.load_state_dict(state)


def is_torchscript(path):
    """Whether the file is an archive of TorchScript, the form in which OpenAI published CLIP."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except Exception:  # no archive, or a broken one, which loading it will tell
        return False


def read_checkpoint(path):
    """{"config", "model", ...} in one of our checkpoints, or the same made of one that CAT-Seg
    published. Nothing in the file is executed."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint file")
    with reading(path, "a checkpoint of tensors and plain containers", DAMAGED):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked > 2 * Path(path).stat().st_size:  # torch writes uncompressed ones
                raise UserError(f"{path} unpacks to more than twice its size: it is no checkpoint")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    kind = "a checkpoint of train.py, or of CAT-Seg with ViT-B/16 or ViT-L/14@336"
    with reading(path, kind, "it holds something else"):
        if {"config", "model"} <= checkpoint.keys():
            return checkpoint
        state = checkpoint["model"]
        kernel = state["sem_seg_head.predictor.clip_model.visual.conv1.weight"]
        config = dict(clip=CAT_SEG[kernel.shape], image_size=384, channels=128)
        return dict(config=config, model=from_cat_seg(state))


def from_cat_seg(state):
    """CAT-Seg's state dict under our names, without its constant attn_mask buffers."""
    ours = {}
    for name, tensor in state.items():
        for theirs, replacement in CAT_SEG_NAMES.items():
            name = re.sub(theirs, replacement, name)
        if not name.endswith("attn_mask"):  # model.SwinBlock.mask computes it
            ours[name] = tensor.flatten() if ".padding_" in name else tensor  # theirs are [1,1,C]
    return ours


def load(path):
    """The Segmenter in a checkpoint that train.py wrote, or that CAT-Seg published."""
    return from_checkpoint(read_checkpoint(path), path)


def from_checkpoint(checkpoint, path):
    """The Segmenter in a dict of `read_checkpoint`; path only names it in errors."""
    with reading(path, "a checkpoint"):
        config = checkpoint["config"]
        model = build(config["clip"], None, config["image_size"], config["channels"])
        load_state(model, checkpoint["model"], path)
    return model


def load_state(model, state, path):
    """load_state_dict with a sentence that names the file and the tensors that don't fit."""
    with reading(path, f"weights of {model.config['clip']}"):
        model.load_state_dict(state)

"""Weights from files: CLIP's as published, CAT-Seg's, and our own checkpoints. What is wrong with a
file, a flag or the network becomes a UserError that names it."""
import functools
import warnings
import zipfile
from pathlib import Path

import huggingface_hub
import open_clip
import torch

from model import build as build_segmenter, clip_sizes
from support.cat_seg import CLIPS, from_cat_seg
from support.errors import UserError, first_line, reading

NOT_PLAIN = {"custom_text", "multimodal_cfg", "timm_model_name", "attentional_pool",
             "hf_model_name", "hf_tokenizer_name", "no_causal_mask"}  # in open_clip's sizes
DAMAGED = "it is cut short, damaged or holds code"


def build(clip, pretrained, image_size=384, channels=128):
    """A Segmenter over a CLIP with published weights. Raises UserError.

    clip: "tiny" (the toy world's size) or the name of an open_clip ViT, such as
    "ViT-B-16-quickgelu". pretrained: one of open_clip's tags ("openai": downloaded once), a file
    with weights of that model, or None for random ones. image_size: side of the training crops.
    channels: width of the head, 128 in CAT-Seg.
    """
    check_sizes(clip, image_size, channels)
    load_weights = None
    if pretrained is not None:
        path = find_clip(clip, pretrained)
        load_weights = functools.partial(load_clip, clip=clip, pretrained=pretrained, path=path)
    return build_segmenter(clip, image_size, channels, load_weights)


def check_sizes(clip, image_size, channels):
    """Refuse what no segmenter can be built of."""
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
    side = visual["image_size"] if image_size % visual["patch_size"] else image_size
    grid = side // visual["patch_size"]
    if grid % 2:
        raise UserError(f"--image-size {image_size} with --clip {clip} gives {grid} x {grid} "
                        "patches; the head needs an even number")


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
    if quick and not trained_quick:
        raise UserError(f"--pretrained {pretrained} was trained with GELU and --clip {clip} "
                        f"computes QuickGELU: use --clip {clip.removesuffix('-quickgelu')}")
    if trained_quick and not quick:
        raise UserError(f"--pretrained {pretrained} was trained with QuickGELU and --clip {clip} "
                        f"computes GELU: use --clip {clip}-quickgelu")
    return download(tag, pretrained) if tag else pretrained


def download(tag, pretrained):
    """The path of weights in open_clip's list: from a cache, or by one attempt to download them."""
    repository = tag["hf_hub"].rstrip("/")
    url = tag.get("url")
    for name in ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"):
        cached = huggingface_hub.try_to_load_from_cache(repository, name)
        if isinstance(cached, str):
            return cached
    try:
        if url and Path("~/.cache/clip", Path(url).name).expanduser().is_file():
            return open_clip.download_pretrained(tag, prefer_hf_hub=False)  # OpenAI's own cache
        # asks once; without a network, the download would go on asking for a minute
        huggingface_hub.file_exists(repository, name)
        return open_clip.download_pretrained(tag)
    except Exception as e:
        source = url or f"the weights in {repository} on the Hugging Face hub"
        raise UserError(f"--pretrained {pretrained} could not be downloaded ({first_line(e)}): "
                        f"fetch {source} elsewhere and use --pretrained FILE") from e


def load_clip(clip_model, clip, pretrained, path):
    """Fill an open_clip.model.CLIP from a file: OpenAI's archives, or what open_clip reads."""
    with reading(f"--pretrained {pretrained}", f"weights of {clip}", DAMAGED):
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
    published; they are told apart by their content. Nothing in the file is executed."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint file")
    with reading(path, "a checkpoint of tensors and plain containers", DAMAGED):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked > 2 * Path(path).stat().st_size:  # torch writes uncompressed ones
                raise UserError(f"{path} unpacks to more than twice its size: it is no checkpoint")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    state = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    if not is_state_dict(state):
        state = {}
    if state and "config" in checkpoint:
        return checkpoint
    kernel = state.get("sem_seg_head.predictor.clip_model.visual.conv1.weight", torch.empty(0))
    if kernel.shape not in CLIPS:
        raise UserError(f"{path} is neither a checkpoint of train.py nor one of CAT-Seg with "
                        "ViT-B/16 or ViT-L/14@336")
    config = dict(clip=CLIPS[kernel.shape], image_size=384, channels=128)
    return dict(config=config, model=from_cat_seg(state))


def is_state_dict(state):
    """Whether it is a dict of names and dense tensors."""
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        return False
    return all(isinstance(t, torch.Tensor) and t.layout == torch.strided for t in state.values())


def load(path):
    """The Segmenter in a checkpoint that train.py wrote, or that CAT-Seg published."""
    return from_checkpoint(read_checkpoint(path), path)


def from_checkpoint(checkpoint, path):
    """The Segmenter in a dict of `read_checkpoint`; path only names it in errors."""
    with reading(path, "a checkpoint of this version"):
        config = checkpoint["config"]
        model = build(config["clip"], None, config["image_size"], config["channels"])
        load_state(model, checkpoint["model"], path)
    return model


def load_into(model, path):
    """Give a Segmenter the weights in a checkpoint of its size."""
    load_state(model, read_checkpoint(path)["model"], path)


def load_state(model, state, path):
    """Like load_state_dict(strict=True), with one sentence about the tensors that don't fit."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    differ = sorted({name for name, _ in expected.items() ^ found.items()})
    if differ:
        name = differ[0]
        raise UserError(f"{path} does not fit {model.config['clip']}: {len(differ)} tensors "
                        f"differ, {name} first (expected {expected.get(name)}, found "
                        f"{found.get(name)})")
    model.load_state_dict(state)

"""Save, load and resume checkpoints, and read those that CAT-Seg published. Anything wrong with a
file becomes a UserError that names it; nothing in a file is executed."""
import hashlib
import io
import json
import re
from pathlib import Path

import open_clip
import torch

from model import Segmenter, clip_config
from support import accidents
from support.files import UserError, digest, reading, replacing

FREE = ("dataset data_root unseen workers out restart accumulate compile log_every eval_every "
        "save_every snapshot_every").split()  # flags that may change when a run is resumed
OPENAI_CONSTANTS = ("input_resolution", "context_length", "vocab_size")  # beside its weights
CAT_SEG = {  # by the shape of the patch embedding's kernel, the CLIP of its published checkpoints
    (768, 3, 16, 16): "ViT-B-16-quickgelu", (1024, 3, 14, 14): "ViT-L-14-336-quickgelu"}
CAT_SEG_NAMES = {  # regex: replacement, applied in this order to the names of its tensors
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


def from_cat_seg(state):
    """CAT-Seg's state dict under our names, without its constant attn_mask buffers."""
    ours = {}
    for name, tensor in state.items():
        for theirs, replacement in CAT_SEG_NAMES.items():
            name = re.sub(theirs, replacement, name)
        if not name.endswith("attn_mask"):  # SwinBlock.shifted_mask computes it
            ours[name] = tensor.flatten() if ".padding_" in name else tensor  # theirs are [1,1,C]
    return ours


def read(path):
    """{"config", "model", "digest" (of the file), ...} of a checkpoint that train.py wrote, or the
    same made of one that CAT-Seg published. Raises UserError."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint file")
    with reading(path, "a checkpoint of train.py, or of CAT-Seg with ViT-B/16 or ViT-L/14@336"):
        content = Path(path).read_bytes()  # training may replace the file at any time
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        identity = hashlib.sha256(content).hexdigest()
        for name, tensor in (*checkpoint["model"].items(), *checkpoint.get("original", {}).items()):
            if tensor.untyped_storage().nbytes() < tensor.nbytes:
                raise ValueError(f"{name} claims more memory than the file holds")
            if not tensor.isfinite().all():
                raise ValueError(f"{name} is not finite")
        state = {name.replace("_orig_mod.", ""): t for name, t in checkpoint["model"].items()}
        if "config" in checkpoint:
            return {**checkpoint, "model": state, "digest": identity}
        kernel = state["sem_seg_head.predictor.clip_model.visual.conv1.weight"]
        config = dict(clip=CAT_SEG[kernel.shape], image_size=384, channels=128)
        return {"config": config, "model": from_cat_seg(state), "digest": identity}


def build_from(checkpoint, path):
    """The Segmenter in what `read` gave; path only names it in errors. Names and shapes are
    compared before any memory is taken."""
    with reading(path, "a checkpoint"):
        config = {name: checkpoint["config"][name] for name in ("clip", "image_size", "channels")}
        with torch.device("meta"):
            model = Segmenter(**config)
        state = {name: tensor.float() for name, tensor in checkpoint["model"].items()}
        model.load_state_dict(state, assign=True)
    return model


def load(path):
    """The Segmenter in a checkpoint that train.py wrote, or that CAT-Seg published."""
    return build_from(read(path), path)


def load_weights(model, path):
    """Fill a Segmenter from a checkpoint: --init-cat-seg. Raises UserError."""
    contents, clip = read(path), model.config["clip"]
    with reading(path, f"weights of --clip {clip}"):
        if contents["config"]["clip"] != clip:  # of another GELU, for one
            raise ValueError(f"they are of --clip {contents['config']['clip']}")
        model.load_state_dict(contents["model"])


def load_clip(clip, pretrained):
    """An open_clip.model.CLIP with published weights. clip: see `model.Segmenter`; pretrained: a
    tag of open_clip ("openai" is downloaded once), or a file. Raises UserError, also for weights
    that are not finite or were trained under other conventions (`check_conventions`)."""
    with reading(f"--pretrained {pretrained}", f"weights of --clip {clip}"):
        sizes = clip_config(clip)
        tag, openai = (open_clip.get_pretrained_cfg(clip, name) for name in (pretrained, "openai"))
        if tag:
            check_conventions(tag, sizes)
            return open_clip.create_model(clip, pretrained)
        if not Path(pretrained).is_file():
            raise ValueError("it is no file, and no tag that open_clip has for this CLIP")
        # OpenAI's files are programs (TorchScript), known by their SHA-256; no other one is opened
        if digest(pretrained) in openai.get("url", ""):
            check_conventions(openai, sizes)
            state = torch.jit.load(pretrained, map_location="cpu").state_dict()
        else:
            beside = Path(pretrained).with_name("open_clip_config.json")
            config = json.loads(beside.read_text()) if beside.is_file() else {}
            if clip != "tiny" and not config:
                accidents.say(f"note: {pretrained} is taken to have the GELU of --clip {clip}")
            about = config.get("model_cfg", {}) | config.get("preprocess_cfg", {})
            check_conventions(about, sizes)
            state = open_clip.factory.load_state_dict(pretrained)
        network = open_clip.model.CLIP(**sizes)
        network.load_state_dict({name.replace("_orig_mod.", ""): tensor for name, tensor
                                 in state.items() if name not in OPENAI_CONSTANTS})
        for name, tensor in network.state_dict().items():
            if not tensor.isfinite().all():
                raise ValueError(f"{name} is not finite")
        return network


def check_conventions(about, sizes):
    """Raise ValueError if weights were trained with another GELU or mean than they are used with.
    about: what open_clip says of them, if anything; sizes: `clip_config`."""
    if about and bool(about.get("quick_gelu")) != bool(sizes.get("quick_gelu")):
        raise ValueError("they were trained with the other GELU: add or drop -quickgelu in --clip")
    mean = tuple(about.get("mean", open_clip.OPENAI_DATASET_MEAN))
    if mean != open_clip.OPENAI_DATASET_MEAN:
        raise ValueError(f"they were trained on pictures with a mean of {mean}, not OpenAI's")


def save(path, step, model, original, **run):
    """Write a checkpoint, on process 0: `model`, the trained CLIP tensors of `original`, and `run`,
    further objects by name (their state_dict, where they have one). Raises UserError."""
    if not accidents.is_first():
        return
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    start = {name: tensor for name, tensor in original.state_dict().items()
             if name in trained and not name.startswith("head.")}
    states = {name: thing.state_dict() if hasattr(thing, "state_dict") else thing
              for name, thing in run.items()}
    with replacing(path) as file:
        torch.save(dict(config=model.config, model=model.state_dict(), original=start, step=step,
                        **states), file)


def resume(path, model, original, momentum, optimiser, scaler, log, args, names, data):
    """Restore the objects from the checkpoint, or delete the whole run if args["restart"]. Returns
    its step, or None where there is none. Raises UserError if the checkpoint has other class names,
    other data (the datasets' fingerprints) or other flags, apart from those in FREE, and if the
    processes do not all see the same file."""
    if args["restart"] and accidents.is_first():
        for old in (path, path.with_name("results.json"), *path.parent.glob("step-??????.pt")):
            old.unlink(missing_ok=True)
    found = None if args["restart"] else digest(path)
    accidents.agree({f"the digest of {path}": found})
    if found is None:
        if not args["restart"] and path.with_name("results.json").exists():
            raise UserError(f"{path.parent} holds results, but no {path.name}: use another --out")
        return None
    state = read(path)
    with reading(path, "a checkpoint to resume from"):
        digests = "images (training, validation) whose names have the digests"
        before = {**state["args"], "class names": state["names"], digests: state["data"]}
        for name, value in {**args, "class names": names, digests: data}.items():
            if name not in FREE and before.get(name) != value:
                raise UserError(f"{path} was trained with {name.replace('_', '-')} "
                                f"{str(before.get(name))[:200]}, not {str(value)[:200]}: use that, "
                                "or another --out")
        step = state["step"]
        if type(step) is not int or not 0 <= step <= args["steps"]:
            raise ValueError(f"it claims to be at step {step} of {args['steps']}")
        model.load_state_dict(state["model"])
        original.load_state_dict({**state["model"], **state["original"]})
        if momentum:
            momentum.load_state_dict(state["momentum"])
        optimiser.load_state_dict(state["optimiser"])
        for parameter, averages in optimiser.state.items():
            if any(averages[name].shape != parameter.shape for name in ("exp_avg", "exp_avg_sq")):
                raise ValueError("the optimiser's state has other shapes")
        scaler.load_state_dict(state["scaler"])
        log[:] = state["log"]
        accidents.say(f"resuming {path} of {state['args']['dataset']} after step {step}")
    return step

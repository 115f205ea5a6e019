"""The checkpoints that CAT-Seg published, under this project's names."""
import re

CLIPS = {(768, 3, 16, 16): "ViT-B-16-quickgelu",  # by the shape of the patch embedding's kernel
         (1024, 3, 14, 14): "ViT-L-14-336-quickgelu"}
NAMES = (  # what in its names gives way to what, in this order
    ("sem_seg_head.predictor.transformer", "head"),
    ("sem_seg_head.predictor.clip_model.logit_scale", "logit_scale"),
    ("sem_seg_head.predictor.clip_model.visual", "image_encoder.visual"),
    ("sem_seg_head.predictor.clip_model", "text_encoder"),
    ("upsample1", "head.middle_up.0"),
    ("upsample2", "head.middle_up.1"),
    (r"layers.(\d).swin_block", r"spatial.\1"),
    (r"layers.(\d).attention(.attention)?", r"classes.\1"),
    ("block_1(.attn)?", "blocks.0"),
    ("block_2(.attn)?", "blocks.1"),
    ("mlp.fc1", "mlp.0"),
    ("mlp.fc2", "mlp.2"),
    ("MLP", "mlp"),
    ("padding_tokens", "padding_token"),
    ("head.conv1", "head.embed"),
    ("head.guidance_projection.0", "head.image_guidance"),
    ("text_guidance_projection.0", "text_guidance"),
    (r"decoder_guidance_projection.(\d).0", r"middle_guidance.\1"),
    ("decoder1", "decoder.0"),
    ("decoder2", "decoder.1"),
    ("conv.double_conv.0", "conv1"),
    ("conv.double_conv.1", "norm1"),
    ("conv.double_conv.3", "conv2"),
    ("conv.double_conv.4", "norm2"),
    ("head.head", "head.logit"))


def from_cat_seg(state):
    """CAT-Seg's state dict under our names, without its constant attn_mask buffers."""
    ours = {}
    for name, tensor in state.items():
        for theirs, replacement in NAMES:
            name = re.sub(theirs, replacement, name)
        if not name.endswith("attn_mask"):  # model.SwinBlock.mask computes it
            ours[name] = tensor.flatten() if ".padding_" in name else tensor  # theirs are [1,1,C]
    return ours

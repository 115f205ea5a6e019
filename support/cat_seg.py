"""The checkpoints that CAT-Seg published, under this project's names."""

CLIPS = {(768, 3, 16, 16): "ViT-B-16-quickgelu",  # by the shape of the patch embedding's kernel
         (1024, 3, 14, 14): "ViT-L-14-336-quickgelu"}
NAMES = (  # what in its names gives way to what, in this order
    ("sem_seg_head.predictor.clip_model.visual.", "image_encoder.visual."),
    ("sem_seg_head.predictor.clip_model.logit_scale", "logit_scale"),
    ("sem_seg_head.predictor.clip_model.", "text_encoder."),
    ("sem_seg_head.predictor.transformer.", "head."),
    ("head.layers.0.swin_block.", "head.spatial.0."),
    ("head.layers.1.swin_block.", "head.spatial.1."),
    (".block_1.", ".blocks.0."),
    (".block_2.", ".blocks.1."),
    (".blocks.0.attn.", ".blocks.0."),
    (".blocks.1.attn.", ".blocks.1."),
    (".mlp.fc1.", ".mlp.0."),
    (".mlp.fc2.", ".mlp.2."),
    ("head.layers.0.attention.", "head.classes.0."),
    ("head.layers.1.attention.", "head.classes.1."),
    (".attention.", "."),
    (".MLP.", ".mlp."),
    (".padding_tokens", ".padding_token"),
    ("head.conv1.", "head.embed."),
    ("head.guidance_projection.0.", "head.image_guidance."),
    ("head.text_guidance_projection.0.", "head.text_guidance."),
    ("head.decoder_guidance_projection.0.0.", "head.middle_guidance.0."),
    ("head.decoder_guidance_projection.1.0.", "head.middle_guidance.1."),
    ("upsample1.", "head.middle_up.0."),
    ("upsample2.", "head.middle_up.1."),
    ("head.decoder1.", "head.decoder.0."),
    ("head.decoder2.", "head.decoder.1."),
    (".conv.double_conv.0.", ".conv1."),
    (".conv.double_conv.1.", ".norm1."),
    (".conv.double_conv.3.", ".conv2."),
    (".conv.double_conv.4.", ".norm2."),
    ("head.head.", "head.logit."),
)


def from_cat_seg(state):
    """CAT-Seg's state dict under our names, without its constant attn_mask buffers."""
    ours = {}
    for name, tensor in state.items():
        if name.endswith("attn_mask"):  # model.SwinBlock.mask computes it
            continue
        for theirs, replacement in NAMES:
            name = name.replace(theirs, replacement)
        ours[name] = tensor.flatten() if ".padding_" in name else tensor  # theirs are [1,1,C]
    return ours

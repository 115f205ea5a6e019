"""CAT-Seg written down literally and slowly, as a second opinion on model.py: no shared code, and
CAT-Seg's own names.

Everything that model.py avoids is done here: the full context of the text encoder, guidance
repeated for each class, the class axis padded to 256, one-hot targets. State dicts use the names of
CAT-Seg's published checkpoints.
"""
import re

import torch
import torch.nn.functional as F

# a small CLIP with QuickGELU, an argument list of open_clip.model.CLIP
SMALL = dict(
    embed_dim=24,
    quick_gelu=True,
    vision_cfg=dict(image_size=32, patch_size=8, width=32, layers=6, head_width=16),
    text_cfg=dict(context_length=77, width=32, heads=2, layers=2))
CLIP, HEAD = "sem_seg_head.predictor.clip_model.", "sem_seg_head.predictor.transformer."


def linear(s, name, x):
    return x @ s[name + ".weight"].T + s[name + ".bias"]


def norm(s, name, x):
    return F.layer_norm(x, x.shape[-1:], s[name + ".weight"], s[name + ".bias"])


def attention(q, k, v, heads, mask):
    """q, k, v [N,n,width], mask [n,n] -> [N,n,width], head by head."""
    d = q.shape[-1] // heads
    out = []
    for q, k, v in zip(q.split(d, -1), k.split(d, -1), v.split(d, -1)):
        out.append((q @ k.transpose(1, 2) / d**0.5 + mask).softmax(-1) @ v)
    return torch.cat(out, -1)


def clip_mlp(s, block, x):
    x = linear(s, block + "mlp.c_fc", norm(s, block + "ln_2", x))
    return linear(s, block + "mlp.c_proj", x * torch.sigmoid(1.702 * x))  # QuickGELU


def clip_block(s, block, x, heads, mask):
    y = norm(s, block + "ln_1", x)
    bias = s[block + "attn.in_proj_bias"].chunk(3)
    q, k, v = (y @ s[f"{block}attn.{c}_proj_weight"].T + b for c, b in zip("qkv", bias))
    x = x + linear(s, block + "attn.out_proj", attention(q, k, v, heads, mask))
    return x + clip_mlp(s, block, x)


def encode_image(s, images, layers, heads, patch, side):
    v = CLIP + "visual."
    if images.shape[-1] != side * patch:
        images = F.interpolate(images, side * patch, mode="bilinear", align_corners=False)
    x = F.conv2d(images, s[v + "conv1.weight"], stride=patch).flatten(2).transpose(1, 2)
    x = torch.cat([s[v + "class_embedding"].expand(len(x), 1, -1), x], 1)
    pos = s[v + "positional_embedding"]
    n = round((len(pos) - 1) ** 0.5)
    if n != side:
        square = pos[1:].reshape(1, n, n, -1).permute(0, 3, 1, 2)
        square = F.interpolate(square, (side, side), mode="bicubic", align_corners=False)
        pos = torch.cat([pos[:1], square.permute(0, 2, 3, 1).reshape(side * side, -1)])
    x = norm(s, v + "ln_pre", x + pos)
    middle = []
    for i in range(layers - 1):
        x = clip_block(s, f"{v}transformer.resblocks.{i}.", x, heads, torch.zeros(()))
        if i + 1 in (layers // 3, 2 * layers // 3):
            middle.append(x[:, 1:].reshape(len(x), side, side, -1).permute(0, 3, 1, 2))
    b = f"{v}transformer.resblocks.{layers - 1}."
    bias = s[b + "attn.in_proj_bias"].chunk(3)[2]
    value = norm(s, b + "ln_1", x) @ s[b + "attn.v_proj_weight"].T + bias
    x = linear(s, b + "attn.out_proj", value) + x[:, :1]
    x = x + clip_mlp(s, b, x)
    return (norm(s, v + "ln_post", x) @ s[v + "proj"])[:, 1:], middle


def encode_text(s, tokens, layers, heads):
    n = tokens.shape[1]
    x = s[CLIP + "token_embedding.weight"][tokens] + s[CLIP + "positional_embedding"][:n]
    mask = torch.full((n, n), float("-inf")).triu(1)
    for i in range(layers):
        x = clip_block(s, f"{CLIP}transformer.resblocks.{i}.", x, heads, mask)
    x = norm(s, CLIP + "ln_final", x)
    x = torch.stack([row[t.argmax()] for row, t in zip(x, tokens)]) @ s[CLIP + "text_projection"]
    return x / x.norm(dim=-1, keepdim=True)


def swin_block(s, name, x, guidance, window, shift, heads=4):
    """x, guidance [N,H,W,C] -> [N,H,W,C]."""
    H, W = x.shape[1:3]
    shortcut = x
    x = norm(s, name + ".norm1", x)
    both = torch.cat([x, guidance], -1)
    region = torch.zeros(H, W)
    if shift:
        both, x = (t.roll((-shift, -shift), (1, 2)) for t in (both, x))
        bands = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
        for i, rows in enumerate(bands):
            for j, cols in enumerate(bands):
                region[rows, cols] = 3 * i + j
    out = torch.zeros_like(x)
    for top in range(0, H, window):
        for left in range(0, W, window):
            here = (slice(None), slice(top, top + window), slice(left, left + window))
            q, k = (linear(s, f"{name}.attn.{c}", both[here].flatten(1, 2)) for c in "qk")
            v = linear(s, name + ".attn.v", x[here].flatten(1, 2))
            r = region[here[1:]].flatten()
            mask = torch.where(r[:, None] == r[None], 0.0, -100.0)
            projected = linear(s, name + ".attn.proj", attention(q, k, v, heads, mask))
            out[here] = projected.unflatten(1, (window, window))
    if shift:
        out = out.roll((shift, shift), (1, 2))
    x = shortcut + out
    hidden = F.gelu(linear(s, name + ".mlp.fc1", norm(s, name + ".norm2", x)))
    return x + linear(s, name + ".mlp.fc2", hidden)


def class_aggregation(s, name, x, guidance, pool, heads=4):
    """x [B,K,H,W,C], text guidance [B,K,C] -> [B,K,H,W,C]."""
    B, K, H, W, C = x.shape
    full = x
    padding = max(256 - K, 0)
    x = F.avg_pool2d(x.flatten(0, 1).permute(0, 3, 1, 2), pool)
    h, w = x.shape[2:]
    x = x.reshape(B, K, C, h * w).permute(0, 3, 1, 2).reshape(B * h * w, K, C)
    guidance = guidance[:, None].expand(-1, h * w, -1, -1).reshape(B * h * w, K, C)
    x = torch.cat([x, s[name + ".padding_tokens"].expand(len(x), padding, -1)], 1)
    guidance = torch.cat([guidance, s[name + ".padding_guidance"].expand(len(x), padding, -1)], 1)
    y = norm(s, name + ".norm1", x)
    both = torch.cat([y, guidance], -1)
    q, k, v = (linear(s, f"{name}.attention.{c}", t) for c, t in zip("qkv", (both, both, y)))
    q, k, v = (t.reshape(len(x), -1, heads, C // heads) for t in (q, k, v))
    q, k = (F.elu(t) + 1 for t in (q, k))
    length = q.shape[1]
    kv = torch.einsum("nshd,nshv->nhdv", k, v / length)
    z = 1 / (torch.einsum("nlhd,nhd->nlh", q, k.sum(1)) + 1e-6)
    x = x + (torch.einsum("nlhd,nhdv,nlh->nlhv", q, kv, z) * length).reshape(len(x), -1, C)
    y = norm(s, name + ".norm2", x)
    x = x + linear(s, name + ".MLP.2", linear(s, name + ".MLP.0", y).relu())
    x = x[:, :K].reshape(B, h, w, K, C).permute(0, 3, 4, 1, 2).flatten(0, 1)
    x = F.interpolate(x, (H, W), mode="bilinear", align_corners=True)
    return full + x.permute(0, 2, 3, 1).reshape(B, K, H, W, C)


def double_conv(s, name, x):
    for conv, group in ((0, 1), (3, 4)):
        x = F.conv2d(x, s[f"{name}.double_conv.{conv}.weight"], padding=1)
        weight, bias = (s[f"{name}.double_conv.{group}.{kind}"] for kind in ("weight", "bias"))
        x = F.group_norm(x, max(1, x.shape[1] // 16), weight, bias).relu()
    return x


def head(s, patches, middle, text, side, pool, window):
    """patches [B,L,D], text [B,K,D] -> logits [B,K,4*side,4*side]."""
    B, K = text.shape[:2]

    def conv(name, x, padding):
        return F.conv2d(x, s[name + ".weight"], s[name + ".bias"], padding=padding)

    def up(name, x, n):
        return F.conv_transpose2d(x, s[name + ".weight"], s[name + ".bias"], stride=n)

    v = patches.transpose(1, 2).reshape(B, -1, side, side)
    cost = torch.einsum("bdhw,bkd->bkhw", F.normalize(v, dim=1), F.normalize(text, dim=-1))
    x = conv(HEAD + "conv1", cost.reshape(B * K, 1, side, side), padding=3).permute(0, 2, 3, 1)
    image = conv(HEAD + "guidance_projection.0", v, padding=1).relu().permute(0, 2, 3, 1)
    words = linear(s, HEAD + "text_guidance_projection.0", text).relu()
    for i in range(2):
        layer = f"{HEAD}layers.{i}."
        guidance = norm(s, layer + "swin_block.guidance_norm", image).repeat_interleave(K, 0)
        x = swin_block(s, layer + "swin_block.block_1", x, guidance, window, 0)
        x = swin_block(s, layer + "swin_block.block_2", x, guidance, window, window // 2)
        x = class_aggregation(s, layer + "attention", x.unflatten(0, (B, K)), words, pool)
        x = x.flatten(0, 1)
    x = x.permute(0, 3, 1, 2)
    for i in (1, 2):
        g = up(f"upsample{i}", middle[i - 1], 2 * i)
        g = conv(f"{HEAD}decoder_guidance_projection.{i - 1}.0", g, padding=1).relu()
        g = g.repeat_interleave(K, 0)
        x = torch.cat([up(f"{HEAD}decoder{i}.up", x, 2), g], 1)
        x = double_conv(s, f"{HEAD}decoder{i}.conv", x)
    return conv(HEAD + "head", x, padding=1).reshape(B, K, 4 * side, 4 * side)


def top_256(s, patches, middle, text, side, pool, window):
    """Each image keeps the 256 classes with the highest cosine anywhere; the others get -100."""
    cosine = torch.einsum("bld,kd->bkl", F.normalize(patches, dim=-1), text)
    logits = torch.full((len(patches), len(text), 4 * side, 4 * side), -100.0)
    for b in range(len(patches)):
        kept = cosine[b].max(-1).values.argsort(descending=True)[:256]
        one = slice(b, b + 1)
        of_image = [m[one] for m in middle]
        found = head(s, patches[one], of_image, text[kept][None], side, pool, window)
        logits[b, kept] = found[0]
    return logits


def loss(logits, pixel_labels):
    """pixel_labels [B,H,W] with -1 where ignored."""
    size = pixel_labels.shape[-2:]
    logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
    one_hot = torch.stack([(pixel_labels == k).float() for k in range(logits.shape[1])], 1)
    return F.binary_cross_entropy_with_logits(logits, one_hot)


NAMES = {  # what in our names becomes what in CAT-Seg's, in this order
    r"^(image|text)_encoder\.|^(?=logit_scale)": CLIP, r"^head\.middle_up\.0": "upsample1",
    r"^head\.middle_up\.1": "upsample2", r"^head\.": HEAD, r"\.embed\b": ".conv1",
    r"\.logit\b": ".head", r"\.image_guidance": ".guidance_projection.0",
    r"\.text_guidance": ".text_guidance_projection.0",
    r"\.middle_guidance\.(\d)": r".decoder_guidance_projection.\1.0",
    r"\.spatial\.(\d)": r".layers.\1.swin_block", r"\.blocks\.0": ".block_1",
    r"\.blocks\.1": ".block_2", r"(block_\d)\.([qkv]|proj)\.": r"\1.attn.\2.",
    r"(block_\d\.mlp)\.0": r"\1.fc1", r"(block_\d\.mlp)\.2": r"\1.fc2",
    r"\.classes\.(\d)\.([qkv])\.": r".layers.\1.attention.attention.\2.",
    r"\.classes\.(\d)": r".layers.\1.attention", r"attention\.mlp": "attention.MLP",
    r"padding_token$": "padding_tokens", r"\.decoder\.0": ".decoder1", r"\.decoder\.1": ".decoder2",
    r"(decoder\d\.)conv1": r"\1conv.double_conv.0", r"(decoder\d\.)norm1": r"\1conv.double_conv.1",
    r"(decoder\d\.)conv2": r"\1conv.double_conv.3", r"(decoder\d\.)norm2": r"\1conv.double_conv.4"}


def to_cat_seg(state):
    """Our state dict under CAT-Seg's names, written independently of support/checkpoint.py."""
    theirs = {}
    for name, tensor in state.items():
        for ours, replacement in NAMES.items():
            name = re.sub(ours, replacement, name)
        theirs[name] = tensor[None, None] if "padding_" in name else tensor
    return theirs

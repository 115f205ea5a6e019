"""The segmenter: CLIP with dense patch features, and CAT-Seg's cost-aggregation head (Cho et al., CVPR 2024).

    images [B,3,S,S] --encode_image--> patches V [B,L,D] ---+--cost--> cosines [B,K,H,W] --aggregate--> --decode--> logits
    tokens [K,n]     --encode_text---> text T [K,D] --------+                                                 [B,K,4H,4W]

`Segmenter.forward` composes these steps, and each can be called alone. What is computed is CAT-Seg to rounding; how it is
computed avoids work whose result is known: guidance that is the same for all classes is projected once per image instead
of K times, classes that only pad are never built, and tokens after a prompt's end are never encoded.

B images, L = H*W patches, K classes, D width of the joint embedding, C = 128 channels of the head.
"""
import math
import re
import zipfile
from pathlib import Path

import open_clip
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

PROMPT = "A photo of a {} in the scene"  # CAT-Seg's
MAX_CLASSES = 256                        # the head looks at this many classes of an image; the others get -100
TINY = dict(  # the toy world's CLIP, an argument list of open_clip.model.CLIP: small enough to pre-train in a minute or two
    embed_dim=128,
    vision_cfg=dict(image_size=64, patch_size=8, width=128, layers=4, head_width=32, pool_type="avg"),
    text_cfg=dict(context_length=20, width=128, layers=2, heads=4))


class Attention(nn.Module):
    """nn.MultiheadAttention with its packed in_proj_weight split in three, so that q and v can train while k stays.

    (A gradient mask on the packed matrix would not do: weight decay would still shrink k.) The names are CAT-Seg's.
    """

    def __init__(self, packed):
        super().__init__()
        self.heads = packed.num_heads
        q, k, v = packed.in_proj_weight.detach().chunk(3)
        self.q_proj_weight, self.k_proj_weight, self.v_proj_weight = (nn.Parameter(w.clone()) for w in (q, k, v))
        self.in_proj_bias = packed.in_proj_bias
        self.out_proj = packed.out_proj

    def forward(self, x, causal=False):                                                    # [B,n,width]
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        q, k, v = (F.linear(x, w, b).unflatten(-1, (self.heads, -1)).transpose(1, 2)       # [B,heads,n,width/heads]
                   for w, b in zip(weights, self.in_proj_bias.chunk(3)))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(out.transpose(1, 2).flatten(2))                               # [B,n,width]

    def value(self, x):
        """What attention to oneself alone would give: the value path, for the dense last block."""
        return self.out_proj(F.linear(x, self.v_proj_weight, self.in_proj_bias.chunk(3)[2]))


def mlp(up, activation, down, x):
    """down(activation(up(x))). The activation is not kept for the backward pass but computed again there: half the memory of a
    transformer block for next to no work (checkpointing stops before the second product, whose result nothing needs)."""
    return checkpoint(lambda h, weight, bias: F.linear(activation(h), weight, bias), up(x), down.weight, down.bias,
                      use_reentrant=False, preserve_rng_state=False)


def run_block(block, x, causal=False):
    """One residual block of open_clip's transformer whose attention is ours. x [B,n,width]."""
    x = x + block.ls_1(block.attn(block.ln_1(x), causal))
    return x + block.ls_2(mlp(*block.mlp, block.ln_2(x)))


class ImageEncoder(nn.Module):
    """open_clip's VisionTransformer, read densely: images to patch embeddings in CLIP's joint space.

    image_size: the side of the square images given to `forward`. When the patch size does not divide it (336-pixel
    ViT-L/14 under CAT-Seg's 384 crops), images are resized to the size that the encoder was pre-trained at.
    class_token_residual: whether the last block adds the class token's residual to every position, as CAT-Seg does, or
    each position's own: what a CLIP that pools by averaging needs, whose class token means nothing.
    """

    def __init__(self, visual, image_size, class_token_residual):
        super().__init__()
        for block in visual.transformer.resblocks:
            block.attn = Attention(block.attn)
        self.visual, self.class_token_residual = visual, class_token_residual
        self.patch_size, native = visual.patch_size[0], visual.image_size[0]
        self.input_size = image_size if image_size % self.patch_size == 0 else native
        self.grid = self.input_size // self.patch_size

    def forward(self, images):
        """images [B,3,S,S], normalised -> patches [B,L,D], (tokens after 1/3, tokens after 2/3 of the blocks) [B,width,H,W]."""
        visual, blocks = self.visual, self.visual.transformer.resblocks
        if images.shape[-1] != self.input_size:
            images = F.interpolate(images, (self.input_size, self.input_size), mode="bilinear", align_corners=False)
        x = visual.conv1(images).flatten(2).transpose(1, 2)                                # [B,L,width]
        x = torch.cat([visual.class_embedding.expand(len(x), 1, -1).to(x), x], 1)          # [B,1+L,width]
        x = visual.ln_pre(x + resize_positions(visual.positional_embedding, self.grid).to(x))
        middle = []
        for i, block in enumerate(blocks[:-1], start=1):
            x = run_block(block, x)
            if i in (len(blocks) // 3, 2 * len(blocks) // 3):
                middle.append(x[:, 1:].transpose(1, 2).unflatten(2, (self.grid, self.grid)))  # [B,width,H,W]
        last, residual = blocks[-1], x[:, :1] if self.class_token_residual else x
        x = residual + last.ls_1(last.attn.value(last.ln_1(x)))                            # no token looks at another
        x = x + last.ls_2(mlp(*last.mlp, last.ln_2(x)))
        return visual.ln_post(x[:, 1:]) @ visual.proj, middle                              # [B,L,D]


def resize_positions(embedding, grid):
    """CLIP's positional embedding [1+n*n,width] for a grid x grid image: bicubic without antialiasing, as CAT-Seg does."""
    side = math.isqrt(len(embedding) - 1)
    if side == grid:
        return embedding
    square = embedding[1:].T.unflatten(1, (side, side))[None]                              # [1,width,side,side]
    square = F.interpolate(square.float(), (grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([embedding[:1], square[0].flatten(1).T.to(embedding)])                # [1+grid*grid,width]


class TextEncoder(nn.Module):
    """The text half of an open_clip CLIP: tokens to class embeddings in CLIP's joint space."""

    def __init__(self, clip):
        super().__init__()
        for block in clip.transformer.resblocks:
            block.attn = Attention(block.attn)
        self.transformer, self.token_embedding, self.ln_final = clip.transformer, clip.token_embedding, clip.ln_final
        self.positional_embedding, self.text_projection = clip.positional_embedding, clip.text_projection
        self.context_length = clip.context_length

    def forward(self, tokens):
        """tokens [K,n] -> text embeddings [K,D], normalised. Attention is causal: nothing after the end token matters."""
        x = self.token_embedding(tokens) + self.positional_embedding[:tokens.shape[1]]     # [K,n,width]
        for block in self.transformer.resblocks:
            x = run_block(block, x, causal=True)
        x = x[torch.arange(len(x), device=x.device), tokens.argmax(-1)]               # the end token has the highest id
        return F.normalize(self.ln_final(x) @ self.text_projection, dim=-1)                # [K,D]


def tokenize(names, context_length=77, prompt=PROMPT):
    """K class names in a prompt -> tokens [K,n], n the longest one's length; of comma-separated synonyms the first counts."""
    prompts = [prompt.format(name.split(",")[0].strip()) for name in names]
    tokens = open_clip.tokenizer.SimpleTokenizer(context_length=context_length)(prompts)
    return tokens[:, :tokens.argmax(-1).max() + 1]


def linear_split(linear, x, guidance):
    """linear([x, guidance]) without building the concatenation: x [B,K,...,C], guidance broadcasts over what it is the same for."""
    c = x.shape[-1]
    return F.linear(x, linear.weight[:, :c]) + F.linear(guidance, linear.weight[:, c:], linear.bias)


class SwinBlock(nn.Module):
    """Window attention within each class's map (Swin, without relative position bias); q and k also see image guidance."""

    def __init__(self, C, window, shift, heads=4):
        super().__init__()
        self.window, self.shift, self.heads = window, shift, heads
        self.norm1, self.norm2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.q, self.k, self.v, self.proj = nn.Linear(2 * C, C), nn.Linear(2 * C, C), nn.Linear(C, C), nn.Linear(C, C)
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C))

    def forward(self, x, guidance):
        """x [B,K,H,W,C], guidance [B,1,H,W,C] -> [B,K,H,W,C]."""
        y = self.norm1(x)
        q, k = (linear_split(linear, y, guidance) for linear in (self.q, self.k))
        q, k, v = (self.windows(t) for t in (q, k, self.v(y)))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(x))             # [BK,windows*heads,w*w,C/heads]
        x = x + self.proj(self.unwindows(y, x.shape))
        return x + mlp(*self.mlp, self.norm2(x))

    def windows(self, x):
        """[B,K,H,W,C] -> [BK,windows*heads,w*w,C/heads], rolled by the shift."""
        B, K, H, W, C = x.shape
        w = self.window
        x = x.roll((-self.shift, -self.shift), (2, 3)) if self.shift else x
        x = x.reshape(B * K, H // w, w, W // w, w, self.heads, C // self.heads)
        return x.permute(0, 1, 3, 5, 2, 4, 6).reshape(B * K, -1, w * w, C // self.heads)

    def unwindows(self, x, shape):
        """The inverse of `windows`."""
        (B, K, H, W, _), w = shape, self.window
        x = x.reshape(B * K, H // w, W // w, self.heads, w, w, -1).permute(0, 1, 4, 2, 5, 3, 6).reshape(shape)
        return x.roll((self.shift, self.shift), (2, 3)) if self.shift else x

    def mask(self, x):
        """-100 between positions that only the roll made neighbours. [1,windows*heads,w*w,w*w], None without a shift."""
        if not self.shift:
            return None
        H, W = x.shape[2:4]
        band = [torch.arange(n, device=x.device) for n in (H, W)]
        band = [(b >= n - self.window).int() + (b >= n - self.shift) for b, n in zip(band, (H, W))]
        region = (band[0][:, None] * 3 + band[1]).unflatten(0, (-1, self.window)).unflatten(-1, (-1, self.window))
        region = region.transpose(1, 2).reshape(-1, self.window ** 2)                      # [windows,w*w]
        mask = -100.0 * (region[:, :, None] != region[:, None])                            # [windows,w*w,w*w]
        return mask.repeat_interleave(self.heads, 0)[None].to(x.dtype)


class SpatialAggregation(nn.Module):
    """A pair of Swin blocks, the second shifted by half a window."""

    def __init__(self, C, window):
        super().__init__()
        self.guidance_norm = nn.LayerNorm(C)
        self.blocks = nn.ModuleList([SwinBlock(C, window, 0), SwinBlock(C, window, window // 2)])

    def forward(self, x, guidance):
        """x [B,K,H,W,C], guidance [B,1,H,W,C] -> [B,K,H,W,C]."""
        guidance = self.guidance_norm(guidance)
        for block in self.blocks:
            x = block(x, guidance)
        return x


class ClassAggregation(nn.Module):
    """Linear attention over the classes at each position; q and k also see text guidance."""

    def __init__(self, C, heads=4):
        super().__init__()
        self.heads = heads
        self.padding_token, self.padding_guidance = nn.Parameter(torch.zeros(C)), nn.Parameter(torch.zeros(C))
        self.q, self.k, self.v = nn.Linear(2 * C, C), nn.Linear(2 * C, C), nn.Linear(C, C)
        self.norm1, self.norm2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C), nn.ReLU(), nn.Linear(4 * C, C))

    def forward(self, x, guidance):
        """x [B,K,H,W,C], guidance [B,K,1,1,C] -> [B,K,H,W,C]. Pools 2x2 while training, as CAT-Seg does."""
        B, K, H, W, C = x.shape
        full, pool = x, 2 if self.training else 1
        if pool > 1:
            x = x.reshape(B, K, H // pool, pool, W // pool, pool, C).mean((3, 5))          # [B,K,H/2,W/2,C]
        x = x + self.attend(self.norm1(x), guidance)
        x = x + mlp(*self.mlp, self.norm2(x))
        if pool > 1:
            x = F.interpolate(x.flatten(0, 1).permute(0, 3, 1, 2), (H, W), mode="bilinear", align_corners=True)
            x = x.permute(0, 2, 3, 1).unflatten(0, (B, K))                                 # [B,K,H,W,C]
        return full + x

    def attend(self, x, guidance):
        split = lambda t: t.unflatten(-1, (self.heads, -1))                                # [...,heads,C/heads]
        feature = lambda t: F.elu(split(t)) + 1
        q, k = (feature(linear_split(linear, x, guidance)) for linear in (self.q, self.k))
        v = split(self.v(x))
        n_pad = max(MAX_CLASSES - x.shape[1], 0)
        length = x.shape[1] + n_pad                                              # v is divided by it lest fp16 overflow
        # CAT-Seg pads the class axis to 256 with one learned token. Padding is the same at every place, so its share in
        # the sums over classes is one outer product, counted as often as it occurs.
        pad = self.norm1(self.padding_token)
        pad_k, pad_v = feature(linear_split(self.k, pad, self.padding_guidance)), split(self.v(pad))
        kv = torch.einsum("bkxyhc,bkxyhd->bxyhcd", k, v / length)
        kv = kv + n_pad * torch.einsum("hc,hd->hcd", pad_k, pad_v / length)
        norm = torch.einsum("bkxyhc,bxyhc->bkxyh", q, k.sum(1) + n_pad * pad_k) + 1e-6
        return (torch.einsum("bkxyhc,bxyhcd->bkxyhd", q, kv) / norm[..., None] * length).flatten(-2)


class Upsample(nn.Module):
    """Double the resolution of each class's map, then two convolutions that also see image guidance."""

    def __init__(self, c_in, c_out, c_guidance):
        super().__init__()
        self.up = nn.ConvTranspose2d(c_in, c_in - c_guidance, 2, stride=2)
        self.conv1, self.conv2 = (nn.Conv2d(c, c_out, 3, padding=1, bias=False) for c in (c_in, c_out))
        self.norm1, self.norm2 = (nn.GroupNorm(max(1, c_out // 16), c_out) for _ in range(2))

    def forward(self, x, guidance):
        """x [B*K,c_in,h,w], guidance [B,c_guidance,2h,2w] -> [B*K,c_out,2h,2w]."""
        B, c = len(guidance), self.up.out_channels
        # conv1([up(x), guidance]) has two halves. No nonlinearity stands between `up` and conv1, so the half of x is one
        # transposed convolution with the product of both kernels; that of guidance and of up's bias is the same for all classes.
        kernel = F.conv2d(self.up.weight, self.conv1.weight[:, :c], padding=2)             # [c_in,c_out,4,4]
        bias = self.up.bias[:, None, None].expand(B, -1, *guidance.shape[2:])              # [B,c,2h,2w]
        common = F.conv2d(torch.cat([bias, guidance], 1), self.conv1.weight, padding=1)    # [B,c_out,2h,2w]
        x = F.conv_transpose2d(x, kernel, stride=2, padding=1).unflatten(0, (B, -1)) + common[:, None]
        x = F.relu(self.norm1(x.flatten(0, 1)), inplace=True)
        return F.relu(self.norm2(self.conv2(x)), inplace=True)


class Head(nn.Module):
    """CAT-Seg's cost aggregation: cosines of patches and texts [B,K,H,W] to logits [B,K,4H,4W].

    D: width of the joint embedding; width: of the image encoder; grid: patches a side; C: channels (128 in CAT-Seg).
    recompute: forget the activations of the widest parts and compute them again in the backward pass.
    """

    def __init__(self, D, width, grid, C=128, layers=2):
        super().__init__()
        self.recompute = False
        self.embed = nn.Conv2d(1, C, 7, padding=3)
        self.image_guidance, self.text_guidance = nn.Conv2d(D, C, 3, padding=1), nn.Linear(D, C)
        self.spatial = nn.ModuleList(SpatialAggregation(C, grid // 2) for _ in range(layers))
        self.classes = nn.ModuleList(ClassAggregation(C) for _ in range(layers))
        self.middle_up = nn.ModuleList(nn.ConvTranspose2d(width, c, n, stride=n) for c, n in ((2 * C, 2), (C, 4)))
        self.middle_guidance = nn.ModuleList(nn.Conv2d(c, c // 8, 3, padding=1) for c in (2 * C, C))
        self.decoder = nn.ModuleList([Upsample(C, C // 2, C // 4), Upsample(C // 2, C // 4, C // 8)])
        self.logit = nn.Conv2d(C // 4, 1, 3, padding=1)

    def aggregate(self, cost, patches, text):
        """cost [B,K,H,W], patches [B,L,D], text [B,K,D] -> features [B,K,H,W,C]."""
        B, K, H, W = cost.shape
        x = self.embed(cost.reshape(B * K, 1, H, W)).permute(0, 2, 3, 1).unflatten(0, (B, K))
        image = self.image_guidance(patches.transpose(1, 2).unflatten(2, (H, W))).relu().permute(0, 2, 3, 1)[:, None]
        text = self.text_guidance(text).relu()[:, :, None, None]                           # [B,K,1,1,C]
        for spatial, classes in zip(self.spatial, self.classes):
            x = self.per_class(spatial, x, image)                                          # image [B,1,H,W,C]
            x = checkpoint(classes, x, text, use_reentrant=False) if self.recompute else classes(x, text)
        return x

    def decode(self, x, middle):
        """features [B,K,H,W,C], middle features of `encode_image` -> logits [B,K,4H,4W]."""
        guidance = [conv(up(m)).relu() for conv, up, m in zip(self.middle_guidance, self.middle_up, middle)]

        def decode_maps(x, *guidance):
            B, K = x.shape[:2]
            x = x.flatten(0, 1).permute(0, 3, 1, 2)                                        # [B*K,C,H,W]
            for up, g in zip(self.decoder, guidance):
                x = up(x, g)
            return self.logit(x).unflatten(0, (B, K)).squeeze(2)

        return self.per_class(decode_maps, x, *guidance)

    def per_class(self, f, x, *guidance, chunk=16):
        """f over x [B,K,...] in chunks of classes, where activations need not all live: f must treat classes alike."""
        if self.recompute and torch.is_grad_enabled():
            return torch.cat([checkpoint(f, part, *guidance, use_reentrant=False) for part in x.split(chunk, 1)], 1)
        if torch.is_grad_enabled():
            return f(x, *guidance)
        return torch.cat([f(part, *guidance) for part in x.split(chunk, 1)], 1)


class Segmenter(nn.Module):
    """CLIP's two encoders and the head. `config` is what `build` needs to make the same again."""

    def __init__(self, clip, image_size, channels, config):
        super().__init__()
        self.config, self.image_size = config, image_size
        self.image_encoder = ImageEncoder(clip.visual, image_size, class_token_residual=clip.visual.pool_type == "tok")
        self.text_encoder = TextEncoder(clip)
        self.logit_scale = clip.logit_scale
        self.grid = (self.image_encoder.grid, self.image_encoder.grid)
        self.head = Head(clip.visual.output_dim, clip.visual.conv1.out_channels, self.grid[0], channels)
        self.set_trained("both")

    def tokenize(self, names, prompt=PROMPT):
        """K class names -> tokens [K,n], as `model.tokenize` does, on the model's device."""
        return tokenize(names, self.text_encoder.context_length, prompt).to(self.logit_scale.device)

    def encode_image(self, images):
        """images [B,3,S,S], normalised with CLIP's mean and std -> patches V [B,L,D], middle features for `decode`."""
        return self.image_encoder(images)

    def encode_text(self, tokens):
        """tokens [K,n] -> T [K,D], normalised."""
        return self.text_encoder(tokens)

    def cost(self, patches, text):
        """Cosines of every patch [B,L,D] with every class [K,D]: [B,K,H,W]."""
        cosine = torch.einsum("bld,kd->bkl", F.normalize(patches, dim=-1), F.normalize(text, dim=-1))
        return cosine.unflatten(2, self.grid)

    def segment(self, patches, middle, text):
        """What follows the encoders: patches [B,L,D], middle features, text [K,D] -> logits [B,K,4H,4W]."""
        cost = self.cost(patches, text)
        text = text.expand(len(cost), -1, -1)                                              # [B,K,D]
        if len(text[0]) <= MAX_CLASSES:
            return self.head.decode(self.head.aggregate(cost, patches, text), middle)
        kept = cost.flatten(2).amax(-1).topk(MAX_CLASSES).indices                          # [B,256]
        B = torch.arange(len(kept), device=kept.device)[:, None]
        logits = self.head.decode(self.head.aggregate(cost[B, kept], patches, text[B, kept]), middle)
        full = logits.new_full((*cost.shape[:2], *logits.shape[2:]), -100.0)
        return full.index_put((B, kept), logits)

    def forward(self, images, tokens):
        """images [B,3,S,S], tokens [K,n] -> logits [B,K,4H,4W], patches V [B,L,D], text T [K,D]."""
        patches, middle = self.encode_image(images)
        text = self.encode_text(tokens)
        return self.segment(patches, middle, text), patches, text

    def set_trained(self, adapt):
        """Choose what trains: the head, and q and v (weights) of the encoders that `adapt` names: both, visual, text, none.

        The last visual block is read densely and never uses its q, so that stays frozen as well.
        """
        if adapt not in ("both", "visual", "text", "none"):
            raise ValueError(f"adapt is both, visual, text or none, not {adapt!r}")
        self.requires_grad_(False)
        self.head.requires_grad_(True)
        for encoder, value in ((self.image_encoder, "visual"), (self.text_encoder, "text")):
            for name, p in encoder.named_parameters():
                p.requires_grad = adapt in ("both", value) and name.endswith(("q_proj_weight", "v_proj_weight"))
        self.image_encoder.visual.transformer.resblocks[-1].attn.q_proj_weight.requires_grad = False


def build(clip, pretrained=None, image_size=384, channels=128):
    """A Segmenter over an open_clip model.

    clip: "tiny" (the toy world's size) or the name of an open_clip ViT, such as "ViT-B-16-quickgelu". pretrained: one of
    open_clip's tags ("openai": downloaded once), a checkpoint file of that model, or None for random weights. image_size: side
    of the training crops. channels: width of the head, 128 in CAT-Seg. Raises ValueError in one sentence.
    """
    sizes = TINY if clip == "tiny" else open_clip.get_model_config(clip)
    if sizes is None:
        raise ValueError(f"--clip {clip}: open_clip has no model of this name (open_clip.list_models() lists them)")
    foreign = ({"custom_text", "multimodal_cfg"} & sizes.keys()
               | {"timm_model_name", "attentional_pool"} & sizes["vision_cfg"].keys()
               | {"hf_model_name", "hf_tokenizer_name", "no_causal_mask", "pool_type"} & sizes["text_cfg"].keys())
    if foreign or not isinstance(sizes["vision_cfg"]["layers"], int):                   # several layer counts: a ResNet
        raise ValueError(f"--clip {clip}: only CLIP models with a plain ViT and CLIP's own text encoder are supported")
    for flag, value in (("image-size", image_size), ("channels", channels)):
        if not 16 <= value <= 2048:
            raise ValueError(f"--{flag} {value} should lie within 16..2048")
    model = open_clip.model.CLIP(**sizes)
    patch, native = sizes["vision_cfg"]["patch_size"], sizes["vision_cfg"]["image_size"]
    grid = (image_size if image_size % patch == 0 else native) // patch
    if grid % 2:
        raise ValueError(f"--image-size {image_size} with --clip {clip} gives {grid} x {grid} patches; the head needs an even "
                         f"number")
    if pretrained is not None:
        load_clip(model, clip, pretrained, sizes.get("quick_gelu", False))
    return Segmenter(model, image_size, channels, dict(clip=clip, image_size=image_size, channels=channels))


def load_clip(model, clip, pretrained, quick_gelu):
    """Load open_clip weights by tag or from a file; refuse weights that were trained with the other activation."""
    tag = open_clip.get_pretrained_cfg(clip, pretrained) if clip != "tiny" else {}
    if tag:
        wants_quick_gelu = tag.get("quick_gelu", False)
    elif Path(pretrained).is_file():
        wants_quick_gelu = True if is_torchscript(pretrained) else None  # only OpenAI published archives; others don't say
    else:
        raise ValueError(f"--pretrained {pretrained}: neither a file nor one of open_clip's tags for {clip}: "
                         f"{', '.join(open_clip.list_pretrained_tags_by_model(clip)) or 'none'}")
    if wants_quick_gelu not in (None, quick_gelu):
        fitting = clip + "-quickgelu" if wants_quick_gelu else clip.removesuffix("-quickgelu")
        raise ValueError(f"--pretrained {pretrained} was trained with {'QuickGELU' if wants_quick_gelu else 'GELU'} and "
                         f"--clip {clip} computes {'QuickGELU' if quick_gelu else 'GELU'}: use --clip {fitting}")
    try:
        path = open_clip.download_pretrained(tag) if tag else pretrained
        if is_torchscript(path):
            state = torch.jit.load(path, map_location="cpu").float().state_dict()
            constants = ("input_resolution", "context_length", "vocab_size")
            model.load_state_dict({name: t for name, t in state.items() if name not in constants})
        else:
            open_clip.load_checkpoint(model, path, strict=True, weights_only=True)
    except Exception as e:  # whatever a wrong file or a missing network raises, in libraries that are not ours
        raise ValueError(f"--pretrained {pretrained}: could not be loaded into {clip}: {first_line(e)}") from e


def is_torchscript(path):
    """Whether the file is a TorchScript archive, the form in which OpenAI published CLIP."""
    return zipfile.is_zipfile(path) and any(n.endswith("/constants.pkl") for n in zipfile.ZipFile(path).namelist())


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def read_checkpoint(path):
    """The dict in one of our checkpoints, or the same made of one that CAT-Seg published: {"config", "model", ...}.

    They are told apart by their content. Nothing in the file is executed. Raises ValueError in one sentence.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such checkpoint file")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:                                          # torch writes uncompressed ones
            if sum(entry.file_size for entry in archive.infolist()) > 2 * Path(path).stat().st_size:
                raise ValueError(f"{path} unpacks to more than twice its size: it is no checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # random bytes, an archive cut short, code where tensors belong
        raise ValueError(f"{path} is not a checkpoint of tensors and plain containers: {first_line(e)}") from e
    state = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    if isinstance(state, dict) and "config" in checkpoint:
        return checkpoint
    name = "sem_seg_head.predictor.clip_model.visual.conv1.weight"
    patch_embedding = state.get(name) if isinstance(state, dict) else None
    if not isinstance(patch_embedding, torch.Tensor) or len(patch_embedding) not in (768, 1024):
        raise ValueError(f"{path} is neither a checkpoint of train.py nor one of CAT-Seg with ViT-B/16 or ViT-L/14@336")
    clip = {768: "ViT-B-16-quickgelu", 1024: "ViT-L-14-336-quickgelu"}[len(patch_embedding)]
    return dict(config=dict(clip=clip, image_size=384, channels=128), model=from_cat_seg(state))


def load(path):
    """The Segmenter in a checkpoint: one that train.py wrote, or one that CAT-Seg published. Raises ValueError."""
    return from_checkpoint(read_checkpoint(path), path)


def from_checkpoint(checkpoint, path):
    """The Segmenter in a dict of `read_checkpoint`; path only names it in errors."""
    try:
        clip, image_size, channels = (checkpoint["config"][name] for name in ("clip", "image_size", "channels"))
        model = build(clip, None, image_size, channels)
        load_state(model, checkpoint["model"], path)
    except Exception as e:  # whatever a stranger's file may hold instead
        sentence = first_line(e) if isinstance(e, ValueError) else f"{type(e).__name__}: {first_line(e)}"
        raise ValueError(sentence if str(path) in sentence else f"{path} can't be loaded ({sentence})") from e
    return model


def load_state(model, state, path):
    """Like load_state_dict(strict=True): every tensor known, none missing, every shape right, or one sentence."""
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    found = {name: tuple(getattr(t, "shape", ())) for name, t in state.items()}
    differ = sorted(name for name in shapes | found if shapes.get(name) != found.get(name))
    if differ:
        raise ValueError(f"{path} does not fit {model.config['clip']}: {len(differ)} tensors differ, {differ[0]} first "
                         f"(expected {shapes.get(differ[0])}, found {found.get(differ[0])})")
    model.load_state_dict(state)


# CAT-Seg's names (detectron2 checkpoints) -> ours, applied in this order
CAT_SEG_NAMES = [(re.compile(pattern), ours) for pattern, ours in (
    (r"^sem_seg_head\.predictor\.clip_model\.(visual\..*)", r"image_encoder.\1"),
    (r"^sem_seg_head\.predictor\.clip_model\.logit_scale$", r"logit_scale"),
    (r"^sem_seg_head\.predictor\.clip_model\.", r"text_encoder."),
    (r"^sem_seg_head\.predictor\.transformer\.layers\.(\d)\.swin_block\.", r"head.spatial.\1."),
    (r"^sem_seg_head\.predictor\.transformer\.layers\.(\d)\.attention\.", r"head.classes.\1."),
    (r"^sem_seg_head\.predictor\.transformer\.", r"head."),
    (r"^upsample(\d)\.", lambda m: f"head.middle_up.{int(m[1]) - 1}."),
    (r"(?<=^head)\.(?:block_|spatial\.(\d)\.block_)(\d)\.", lambda m: f".spatial.{m[1]}.blocks.{int(m[2]) - 1}."),
    (r"^(head\.(?:spatial|classes).*)\.(?:attn|attention)\.", r"\1."),
    (r"^(head\.spatial.*\.mlp)\.fc(\d)", lambda m: f"{m[1]}.{2 * int(m[2]) - 2}"),
    (r"^(head\.classes\.\d)\.MLP\.", r"\1.mlp."),
    (r"^(head\.classes\.\d)\.padding_tokens$", r"\1.padding_token"),
    (r"^head\.conv1\.", r"head.embed."),
    (r"^head\.guidance_projection\.0\.", r"head.image_guidance."),
    (r"^head\.text_guidance_projection\.0\.", r"head.text_guidance."),
    (r"^head\.decoder_guidance_projection\.(\d)\.0\.", r"head.middle_guidance.\1."),
    (r"^head\.decoder(\d)\.(?:conv\.)?", lambda m: f"head.decoder.{int(m[1]) - 1}."),
    (r"(?<=\.)double_conv\.(\d)\.", lambda m: {"0": "conv1.", "1": "norm1.", "3": "conv2.", "4": "norm2."}[m[1]]),
    (r"^head\.head\.", r"head.logit."),
)]


def from_cat_seg(state):
    """CAT-Seg's state dict under our names. Its attn_mask buffers are constants that SwinBlock.mask computes."""
    ours = {}
    for name, tensor in state.items():
        if not name.endswith("attn_mask"):
            for pattern, replacement in CAT_SEG_NAMES:
                name = pattern.sub(replacement, name)
            ours[name] = tensor.flatten() if ".padding_" in name else tensor               # theirs are [1,1,C]
    return ours

"""The segmenter: CLIP with dense patch features, and CAT-Seg's head (Cho et al., CVPR 2024).

    images [B,3,S,S] --encode_image--> patches V [B,L,D] --+
                                                           +--cost--> cosines [B,K,H,W]
    tokens [K,n] -----encode_text----> text T [K,D] -------+             |
                                                   aggregate, decode --> logits [B,K,4H,4W]

The result is CAT-Seg's to rounding (test_equals_cat_seg_written_literally). Where the code is
faster than the obvious line, that line is in the docstring. B images, L = H*W patches, K classes,
D width of the joint embedding, C channels of the head.
"""
import math

import open_clip
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch.utils.checkpoint import checkpoint

PROMPT = "A photo of a {} in the scene"  # CAT-Seg's
MAX_CLASSES = 256  # the head sees at most this many per image; the others get a logit of -100
TINY = dict(  # the toy world's CLIP
    embed_dim=128,
    vision_cfg=dict(image_size=64, patch_size=8, width=128, layers=4, head_width=32,
                    pool_type="avg"),
    text_cfg=dict(context_length=20, width=128, layers=2, heads=4))


def device_type(x):
    return "cuda" if x.is_cuda else "cpu"  # autocast refuses "meta"


def cast(parameter, dtype):
    """parameter.to(dtype), cached on a frozen parameter until it changes. Autocast would cast it at
    every use, and again for the teacher, which shares it."""
    if parameter.dtype == dtype:
        return parameter
    if parameter.requires_grad or torch.compiler.is_compiling():
        return parameter.to(dtype)
    state = dtype, parameter.device, parameter._version, torch.is_inference_mode_enabled()
    cached_state, cached = getattr(parameter, "cached_cast", (None, None))
    if cached_state != state:
        cached = parameter.to(dtype)
        parameter.cached_cast = state, cached
    return cached


def linear(layer, x):
    """layer(x) for a linear layer, in the dtype of x."""
    return F.linear(x, cast(layer.weight, x.dtype), cast(layer.bias, x.dtype))


def norm(layer, x):
    """layer(x) for a LayerNorm or GroupNorm, in the dtype of x. Autocast would cast x to float32
    and back, although the sums are in float32 either way."""
    weight, bias = cast(layer.weight, x.dtype), cast(layer.bias, x.dtype)
    with torch.autocast(device_type(x), enabled=False):
        if isinstance(layer, nn.GroupNorm):
            return F.group_norm(x, layer.num_groups, weight, bias, layer.eps)
        return F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)


class Attention(nn.Module):
    """nn.MultiheadAttention with in_proj_weight split in three, so that q and v train while k does
    not. (With k's gradient masked instead, weight decay would still change it.)"""

    def __init__(self, packed):
        super().__init__()
        self.heads = packed.num_heads
        q, k, v = packed.in_proj_weight.detach().chunk(3)
        self.q_proj_weight = nn.Parameter(q.clone())
        self.k_proj_weight = nn.Parameter(k.clone())
        self.v_proj_weight = nn.Parameter(v.clone())
        self.in_proj_bias = packed.in_proj_bias
        self.out_proj = packed.out_proj

    def forward(self, x, causal=False):
        """x [B,n,width] -> [B,n,width]. causal: no token attends to a later one. q and v are not
        cached: they change at every step, also the teacher's, which require no gradient."""
        packed = torch.cat([self.q_proj_weight.to(x.dtype), cast(self.k_proj_weight, x.dtype),
                            self.v_proj_weight.to(x.dtype)])
        qkv = F.linear(x, packed, cast(self.in_proj_bias, x.dtype))  # [B,n,3*width]
        qkv = qkv.unflatten(2, (3, self.heads, -1)).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in qkv)  # [B,heads,n,width/heads]
        x = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return linear(self.out_proj, x.transpose(1, 2).flatten(2))

    def value(self, x):
        """What forward gives if every token attends to itself alone."""
        v_bias = cast(self.in_proj_bias, x.dtype).chunk(3)[2]
        return linear(self.out_proj, F.linear(x, self.v_proj_weight, v_bias))


def mlp(layers, x):
    """layers(x) for the MLP of one of CLIP's blocks; x [B,n,width]. The two factors of QuickGELU,
    h * sigmoid(1.702 h) = silu(1.702 h) / 1.702, are folded into the matrix products."""
    if not isinstance(layers.gelu, open_clip.transformer.QuickGELU):
        return linear(layers.c_proj, layers.gelu(linear(layers.c_fc, x)))
    up, up_bias = cast(layers.c_fc.weight, x.dtype), cast(layers.c_fc.bias, x.dtype)
    down, down_bias = cast(layers.c_proj.weight, x.dtype), cast(layers.c_proj.bias, x.dtype)
    h = torch.addmm(1.702 * up_bias, x.flatten(0, 1), up.T, alpha=1.702)
    return torch.addmm(down_bias, F.silu(h), down.T, alpha=1 / 1.702).view_as(x)


def run_block(block, x, causal=False):
    """One residual block of open_clip's transformer whose attention is ours; x [B,n,width]."""
    x = x + block.ls_1(block.attn(norm(block.ln_1, x), causal))
    return x + block.ls_2(mlp(block.mlp, norm(block.ln_2, x)))


def run_dense_block(block, x, class_token_residual):
    """CLIP's last block for dense features: each token attends only to itself. x [B,1+L,width].

    h = out_proj(v_proj(ln_1(x))) + x[:, :1]; return h + mlp(ln_2(h)). As in CAT-Seg, the residual
    is the class token's at every position; a CLIP that pools by averaging has each token's own."""
    residual = x[:, :1] if class_token_residual else x
    x = residual + block.ls_1(block.attn.value(norm(block.ln_1, x)))
    return x + block.ls_2(mlp(block.mlp, norm(block.ln_2, x)))


class ImageEncoder(nn.Module):
    """open_clip's VisionTransformer with a dense last block: images to patches in the joint space.
    Square images of any size are resized to image_size or, where the patch size does not divide it
    (ViT-L/14@336 with CAT-Seg's 384), to the pre-training size. Modifies `visual` in place."""

    def __init__(self, visual, image_size):
        super().__init__()
        for block in visual.transformer.resblocks:
            block.attn = Attention(block.attn)
        self.visual = visual
        self.class_token_residual = visual.pool_type == "tok"
        patch_size = visual.patch_size[0]
        self.input_size = visual.image_size[0] if image_size % patch_size else image_size
        self.grid = self.input_size // patch_size

    def forward(self, images):
        """images [B,3,S,S] with CLIP's mean and standard deviation -> patches [B,L,D], not of unit
        length; and the patch tokens [B,width,H,W] after one and after two thirds of the blocks."""
        visual = self.visual
        blocks = visual.transformer.resblocks
        if images.shape[-1] != self.input_size:
            images = F.interpolate(images, (self.input_size, self.input_size), mode="bilinear")
        x = visual.conv1(images).flatten(2).transpose(1, 2)  # [B,L,width]
        class_token = visual.class_embedding.expand(len(x), 1, -1).to(x)
        x = torch.cat([class_token, x], 1)  # [B,1+L,width]
        positions = resample_abs_pos_embed(visual.positional_embedding[None],
                                           [self.grid, self.grid], antialias=False)
        x = norm(visual.ln_pre, x + positions.to(x))
        middle = []
        for i, block in enumerate(blocks[:-1], start=1):
            x = run_block(block, x)
            if i in (len(blocks) // 3, 2 * len(blocks) // 3):
                middle.append(x[:, 1:].transpose(1, 2).unflatten(2, (self.grid, self.grid)))
        x = run_dense_block(blocks[-1], x, self.class_token_residual)
        patches = norm(visual.ln_post, x[:, 1:]) @ cast(visual.proj, x.dtype)  # [B,L,D]
        return patches, middle


class TextEncoder(nn.Module):
    """The text half of an open_clip CLIP: tokens to class embeddings in the joint space."""

    def __init__(self, clip):
        super().__init__()
        for block in clip.transformer.resblocks:
            block.attn = Attention(block.attn)
        self.transformer = clip.transformer
        self.token_embedding = clip.token_embedding
        self.ln_final = clip.ln_final
        self.positional_embedding = clip.positional_embedding
        self.text_projection = clip.text_projection
        self.context_length = clip.context_length

    def forward(self, tokens):
        """tokens [K,n] -> text embeddings [K,D], of unit length. Attention is causal, so nothing
        after the end token (the highest id) matters and n need not be the full context."""
        x = self.token_embedding(tokens) + self.positional_embedding[:tokens.shape[1]]
        if torch.is_autocast_enabled(device_type(x)):
            x = x.to(torch.get_autocast_dtype(device_type(x)))
        for block in self.transformer.resblocks:
            x = run_block(block, x, causal=True)
        x = x[torch.arange(len(x), device=x.device), tokens.argmax(-1)]  # [K,width]
        return F.normalize(norm(self.ln_final, x) @ cast(self.text_projection, x.dtype), dim=-1)


def tokenize(names, context_length=77):
    """K class names in a prompt -> tokens [K,n], n being the longest one's length. Of
    comma-separated synonyms the first counts."""
    prompts = [PROMPT.format(name.partition(",")[0]) for name in names]
    tokens = open_clip.tokenize(prompts, context_length)
    return tokens[:, :tokens.argmax(-1).max() + 1]


def project(layer, x, guidance):
    """q and k of cat([x, guidance], -1) and v of x, each [...,heads,C/heads], in one product.
    x [...,C]; guidance has size 1 on the axes along which it is constant, so that it is projected
    once and broadcast."""
    C = x.shape[-1]
    v_weight = F.pad(layer.v.weight, (0, C))  # [C,2C], zero for guidance
    weights = torch.cat([layer.q.weight, layer.k.weight, v_weight]).to(x.dtype).split(C, 1)
    bias = torch.cat([layer.q.bias, layer.k.bias, layer.v.bias])
    qkv = F.linear(x, weights[0]) + F.linear(guidance, weights[1], bias)  # [...,3C]
    return qkv.unflatten(-1, (3, layer.heads, -1)).unbind(-3)


class SwinBlock(nn.Module):
    """Window attention (Swin's) within each class's map; q and k also see image guidance."""

    def __init__(self, C, window, shift_size, heads=4):
        super().__init__()
        self.window = window
        self.shift_size = shift_size
        self.heads = heads
        self.norm1 = nn.LayerNorm(C)
        self.norm2 = nn.LayerNorm(C)
        self.q = nn.Linear(2 * C, C)
        self.k = nn.Linear(2 * C, C)
        self.v = nn.Linear(C, C)
        self.proj = nn.Linear(C, C)
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C))

    def forward(self, x, guidance, mask):
        """x [B,K,H,W,C], guidance [B,1,H,W,C], mask from `shifted_mask`. Returns [B,K,H,W,C]."""
        y = self.to_windows(norm(self.norm1, x))
        qkv = project(self, y, self.to_windows(guidance))  # each [B,K,windows,w*w,heads,C/heads]
        q, k, v = (part.flatten(0, 2).transpose(1, 2) for part in qkv)  # [N,heads,w*w,C/heads]
        mask = mask.repeat(len(q) // len(mask), 1, 1)[:, None] if self.shift_size else None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y = self.proj(y.transpose(1, 2).flatten(2))  # [B*K*windows,w*w,C]
        x = x + self.from_windows(y, x.shape)
        hidden = self.mlp[0](norm(self.norm2, x))
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return x + checkpoint(self.mlp[1:], hidden, use_reentrant=False,
                                  preserve_rng_state=False)  # recompute rather than keep
        return x + self.mlp[1:](hidden)

    def to_windows(self, x):
        """[B,K,H,W,C] -> [B,K,windows,w*w,C], rolled by the shift."""
        if self.shift_size:
            x = x.roll((-self.shift_size, -self.shift_size), (2, 3))
        x = x.unflatten(3, (-1, self.window)).unflatten(2, (-1, self.window))
        return x.transpose(3, 4).flatten(4, 5).flatten(2, 3)

    def from_windows(self, x, shape):
        """The inverse of `to_windows`, for x of any shape; shape: (B, K, H, W, C)."""
        B, K, H, W, C = shape
        w = self.window
        x = x.reshape(B, K, H // w, W // w, w, w, C).transpose(3, 4).reshape(shape)
        if self.shift_size:
            x = x.roll((self.shift_size, self.shift_size), (2, 3))
        return x

    def shifted_mask(self, x):
        """-100 between positions that only the roll made neighbours: [windows,w*w,w*w], for
        x [B,K,H,H,C]."""
        far = torch.arange(x.shape[2], device=x.device) < self.shift_size  # [H], rolled far away
        region = 2 * far[:, None] + far  # [H,H]
        region = self.to_windows(region[None, None, :, :, None])[0, 0]  # [windows,w*w,1]
        mask = -100.0 * (region != region.mT)
        return mask.to(x.dtype)


class SpatialAggregation(nn.Module):
    """A pair of Swin blocks, the second shifted by half a window."""

    def __init__(self, C, window):
        super().__init__()
        self.guidance_norm = nn.LayerNorm(C)
        self.blocks = nn.ModuleList([SwinBlock(C, window, 0), SwinBlock(C, window, window // 2)])

    def forward(self, x, guidance, mask):
        """x [B,K,H,W,C], guidance [B,1,H,W,C], mask of the second block. Returns [B,K,H,W,C]."""
        guidance = norm(self.guidance_norm, guidance)
        for block in self.blocks:
            x = block(x, guidance, mask)
        return x


class ClassAggregation(nn.Module):
    """Linear attention over the classes at each position; q and k also see text guidance."""

    def __init__(self, C, heads=4):
        super().__init__()
        self.heads = heads
        self.padding_token = nn.Parameter(torch.zeros(C))
        self.padding_guidance = nn.Parameter(torch.zeros(C))
        self.q = nn.Linear(2 * C, C)
        self.k = nn.Linear(2 * C, C)
        self.v = nn.Linear(C, C)
        self.norm1 = nn.LayerNorm(C)
        self.norm2 = nn.LayerNorm(C)
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C), nn.ReLU(), nn.Linear(4 * C, C))

    def forward(self, x, guidance):
        """x [B,K,H,W,C], guidance [B,K,1,1,C] -> [B,K,H,W,C]. Pools 2x2 in training."""
        B, K, H, W, C = x.shape
        y = x
        if self.training:
            y = y.reshape(B, K, H // 2, 2, W // 2, 2, C).mean((3, 5))  # [B,K,H/2,W/2,C]
        y = y + self.attend(norm(self.norm1, y), guidance)
        y = y + self.mlp(norm(self.norm2, y))
        if self.training:
            y = y.flatten(0, 1).permute(0, 3, 1, 2)  # [B*K,C,H/2,W/2]
            with torch.autocast(device_type(x), enabled=False):  # autocast would use float32
                y = F.interpolate(y, (H, W), mode="bilinear", align_corners=True)
            y = y.permute(0, 2, 3, 1).unflatten(0, (B, K))
        return x + y

    def attend(self, x, guidance):
        """q (k^T v) / (q (sum of k)) over the K classes of x [B,K,h,w,C], padded to 256, with
        q, k = elu(linear(cat([x, guidance], -1))) + 1 and v = linear(x). Returns [B,K,h,w,C]."""
        q, k, v = project(self, x, guidance)  # [B,K,h,w,heads,C/heads]
        q, k = F.elu(q) + 1, F.elu(k) + 1
        length = max(x.shape[1], MAX_CLASSES)  # dividing v by it keeps fp16 from overflowing
        kv = torch.einsum("bkxyhc,bkxyhd->bxyhcd", k, v / length)
        pad_kv, pad_k = self.padding(x.shape[1], length)
        total = (q * (k.sum(1) + pad_k)[:, None]).sum(-1) + 1e-6  # [B,K,h,w,heads], float32
        out = torch.einsum("bkxyhc,bxyhcd->bkxyhd", q, kv + pad_kv)
        return (out * (length / total)[..., None].to(x.dtype)).flatten(-2)

    def padding(self, K, length):
        """What padding adds to the sums of k^T v [heads,C/heads,C/heads] and of k [heads,C/heads].
        CAT-Seg appends 256 - K copies of a learned token to the class axis. As they are equal, the
        sum over them is one outer product times their number."""
        copies = max(MAX_CLASSES - K, 0)
        _, k, v = project(self, norm(self.norm1, self.padding_token), self.padding_guidance)
        k = F.elu(k) + 1
        return copies * torch.einsum("hc,hd->hcd", k, v / length), copies * k


class Upsample(nn.Module):
    """Double the resolution of each class's map, then two convolutions; image guidance joins in."""

    def __init__(self, c_in, c_out, c_guidance):
        super().__init__()
        groups = max(1, c_out // 16)
        self.up = nn.ConvTranspose2d(c_in, c_in - c_guidance, 2, stride=2)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(groups, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out)

    def forward(self, x, guidance):
        """x [B*K,c_in,h,w], guidance [B,c_guidance,2h,2w] -> [B*K,c_out,2h,2w]."""
        x = F.relu(norm(self.norm1, self.up_and_conv1(x, guidance)), inplace=True)
        return F.relu(norm(self.norm2, self.conv2(x)), inplace=True)

    def up_and_conv1(self, x, guidance):
        """conv1(cat([up(x), guidance], 1)), with guidance repeated for each of the K classes.

        The part of x is one transposed convolution with the product of both kernels. The part of
        guidance and of up's bias is the same for all classes and computed once."""
        B = len(guidance)
        c = self.up.out_channels
        kernel = F.conv2d(self.up.weight, self.conv1.weight[:, :c], padding=2)  # [c_in,c_out,4,4]
        bias = self.up.bias[:, None, None].expand(B, -1, *guidance.shape[2:])  # [B,c,2h,2w]
        common = F.conv2d(torch.cat([bias, guidance], 1), self.conv1.weight, padding=1)
        x = F.conv_transpose2d(x, kernel, stride=2, padding=1)  # [B*K,c_out,2h,2w]
        return (x.unflatten(0, (B, -1)) + common[:, None]).flatten(0, 1)


class Head(nn.Module):
    """Cosines of patches and texts [B,K,H,W] to logits [B,K,4H,4W].

    D: width of the joint embedding; width: of the image encoder; grid: patches a side, an even
    number; C: channels; prior: initial probability of each class (None: about 0.5). A replacement
    needs `aggregate` and `decode`, and "norm" in the names of parameters without weight decay."""

    def __init__(self, D, width, grid, C=128, prior=None):
        super().__init__()
        self.embed = nn.Conv2d(1, C, 7, padding=3)
        self.image_guidance = nn.Conv2d(D, C, 3, padding=1)
        self.text_guidance = nn.Linear(D, C)
        # two pairs of spatial and class aggregation, as in CAT-Seg
        self.spatial = nn.ModuleList(SpatialAggregation(C, grid // 2) for _ in range(2))
        self.classes = nn.ModuleList(ClassAggregation(C) for _ in range(2))
        self.middle_up = nn.ModuleList([nn.ConvTranspose2d(width, 2 * C, 2, stride=2),
                                        nn.ConvTranspose2d(width, C, 4, stride=4)])
        self.middle_guidance = nn.ModuleList([nn.Conv2d(2 * C, C // 4, 3, padding=1),
                                              nn.Conv2d(C, C // 8, 3, padding=1)])
        self.decoder = nn.ModuleList([Upsample(C, C // 2, C // 4),
                                      Upsample(C // 2, C // 4, C // 8)])
        self.logit = nn.Conv2d(C // 4, 1, 3, padding=1)
        if prior is not None:
            nn.init.constant_(self.logit.bias, math.log(prior / (1 - prior)))

    def aggregate(self, cost, patches, text):
        """cost [B,K,H,W], patches [B,L,D], text [B,K,D] -> features [B,K,H,W,C]."""
        B, K, H, W = cost.shape
        x = self.embed(cost.reshape(B * K, 1, H, W)).permute(0, 2, 3, 1).contiguous()
        x = x.unflatten(0, (B, K))  # [B,K,H,W,C]
        image = self.image_guidance(patches.transpose(1, 2).unflatten(2, (H, W))).relu()
        image = image.permute(0, 2, 3, 1)[:, None]  # [B,1,H,W,C]
        text = self.text_guidance(text).relu()[:, :, None, None]  # [B,K,1,1,C]
        mask = self.spatial[0].blocks[1].shifted_mask(x)
        for spatial, classes in zip(self.spatial, self.classes):
            x = self.per_class(spatial, x, image, mask)
            x = classes(x, text)
        return x

    def decode(self, x, middle):
        """features [B,K,H,W,C], middle features of `encode_image` -> logits [B,K,4H,4W]."""
        guidance = [conv(up(features)).relu() for conv, up, features
                    in zip(self.middle_guidance, self.middle_up, middle)]
        return self.per_class(self.decode_maps, x, *guidance)

    def decode_maps(self, x, *guidance):
        B, K = x.shape[:2]
        x = x.flatten(0, 1).permute(0, 3, 1, 2)  # [B*K,C,H,W]
        for upsample, features in zip(self.decoder, guidance):
            x = upsample(x, features)
        return self.logit(x).unflatten(0, (B, K)).squeeze(2)

    def per_class(self, function, x, *guidance, chunk=64):
        """function(x, *guidance) for a function that treats each class of x [B,K,...] by itself. In
        evaluation it goes through the classes in chunks, to bound memory."""
        if torch.is_grad_enabled():
            return function(x, *guidance)
        return torch.cat([function(part, *guidance) for part in x.split(chunk, 1)], 1)


def clip_config(clip):
    """The arguments of open_clip.model.CLIP for "tiny" or the name of one of open_clip's CLIPs with
    a plain ViT and CLIP's own text encoder. Raises ValueError for any other name."""
    if clip == "tiny":
        return TINY
    if clip not in open_clip.list_models():
        raise ValueError(f"open_clip has no model {clip!r} (open_clip.list_models() lists them)")
    sizes = open_clip.get_model_config(clip)
    text_keys = {"context_length", "vocab_size", "width", "heads", "layers"}
    if (not isinstance(sizes["vision_cfg"].get("layers"), int)
            or sizes["text_cfg"].keys() - text_keys
            or sizes.keys() - {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}):
        raise ValueError(f"{clip} is no CLIP with a plain ViT and CLIP's own text encoder")
    return sizes


class Segmenter(nn.Module):
    """CLIP's two encoders and the head.

    clip: "tiny", or one of open_clip's CLIPs with a ViT, such as "ViT-B-16-quickgelu". image_size:
    side of the training crops. channels: width of the head. network: an open_clip.model.CLIP of
    this name, whose modules are modified and kept (default: random weights). prior: see `Head`.
    Raises ValueError for another kind of CLIP and for sizes that do not fit."""

    def __init__(self, clip, image_size=384, channels=128, network=None, prior=None):
        super().__init__()
        sizes = clip_config(clip)
        if not 16 <= image_size <= 2048:
            raise ValueError(f"the image size should lie within 16..2048, not {image_size}")
        network = network or open_clip.model.CLIP(**sizes)
        visual = network.visual
        self.config = dict(clip=clip, image_size=image_size, channels=channels)  # to build it again
        self.image_size = image_size
        self.image_encoder = ImageEncoder(visual, image_size)
        self.text_encoder = TextEncoder(network)
        self.logit_scale = network.logit_scale
        side = self.image_encoder.grid
        if side % 2 or image_size % side:
            raise ValueError(f"an image size of {image_size} gives {side} x {side} patches; the "
                             "head needs an even number that divides the size")
        self.grid = (side, side)  # rows, columns of patches
        self.head = Head(visual.output_dim, visual.conv1.out_channels, side, channels, prior)
        self.set_trained("both")

    def tokenize(self, names):
        """K class names -> tokens [K,n] on the model's device; see the function `tokenize`."""
        return tokenize(names, self.text_encoder.context_length).to(self.logit_scale.device)

    def encode_image(self, images):
        """images [B,3,S,S] -> patches V [B,L,D], middle features for `Head.decode`."""
        return self.image_encoder(images)

    def encode_text(self, tokens):
        """tokens [K,n] -> T [K,D], of unit length."""
        return self.text_encoder(tokens)

    def cost(self, patches, text):
        """Cosines of every patch [B,L,D] with every class, text [K,D] of unit length: [B,K,H,W]."""
        V = F.normalize(patches, dim=-1)
        return torch.einsum("bld,kd->bkl", V, text).unflatten(2, self.grid)

    def compute_logits(self, patches, middle, text):
        """What follows the encoders: patches [B,L,D], middle features, text [K,D] -> logits
        [B,K,4H,4W]. Of more than 256 classes, the head sees those of the highest cosine anywhere in
        the image; the others get -100."""
        cost = self.cost(patches, text)
        text = text.expand(len(cost), -1, -1)  # [B,K,D]
        if cost.shape[1] <= MAX_CLASSES:
            return self.head.decode(self.head.aggregate(cost, patches, text), middle)
        kept = cost.flatten(2).amax(-1).topk(MAX_CLASSES).indices  # [B,256]
        image = torch.arange(len(kept), device=kept.device)[:, None]  # [B,1], pairs with kept
        features = self.head.aggregate(cost[image, kept], patches, text[image, kept])
        logits = self.head.decode(features, middle)  # [B,256,4H,4W]
        all_logits = logits.new_full((*cost.shape[:2], *logits.shape[2:]), -100.0)
        return all_logits.index_put((image, kept), logits)

    def forward(self, images, tokens):
        """images [B,3,S,S], tokens [K,n] -> logits [B,K,4H,4W], patches [B,L,D], text [K,D]."""
        patches, middle = self.encode_image(images)
        text = self.encode_text(tokens)
        return self.compute_logits(patches, middle, text), patches, text

    def set_trained(self, adapt):
        """Choose what trains: the head, and the q and v weights of the encoders that `adapt` names
        (both, visual, text or none), except the last visual block's q, which is never used."""
        encoders = {"both": ("image_encoder", "text_encoder"), "visual": ("image_encoder",),
                    "text": ("text_encoder",), "none": ()}[adapt]
        for name, parameter in self.named_parameters():
            projection = name.endswith(("q_proj_weight", "v_proj_weight"))
            trained = name.startswith(encoders) and projection
            parameter.requires_grad = trained or name.startswith("head.")
        self.image_encoder.visual.transformer.resblocks[-1].attn.q_proj_weight.requires_grad = False


build = Segmenter  # the name that scripts use

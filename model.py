"""The segmenter: CLIP with dense patch features, and CAT-Seg's head (Cho et al., CVPR 2024).

    images [B,3,S,S] --encode_image--> patches V [B,L,D] --+
                                                           +--cost--> cosines [B,K,H,W]
    tokens [K,n] -----encode_text----> text T [K,D] -------+             |
                                                   aggregate, decode --> logits [B,K,4H,4W]

`Segmenter.forward` composes these steps, and each can be called alone. The result is CAT-Seg's to
rounding (test_equals_cat_seg_written_literally). Where the code is faster than the obvious line,
that line is in the docstring.

B images, L = H*W patches, K classes, D width of the joint embedding, C channels of the head.
"""
import functools
import math

import open_clip
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

PROMPT = "A photo of a {} in the scene"  # CAT-Seg's
PROMPT_START = 5  # tokens of it before the name: the start token, a, photo, of, a
make_tokenizer = functools.cache(open_clip.tokenizer.SimpleTokenizer)
MAX_CLASSES = 256  # of an image, that the head looks at; the logits of any further ones are -100
TINY = dict(  # the toy world's CLIP: small enough to pre-train in a minute or two
    embed_dim=128,
    vision_cfg=dict(image_size=64, patch_size=8, width=128, layers=4, head_width=32,
                    pool_type="avg"),
    text_cfg=dict(context_length=20, width=128, layers=2, heads=4))


class Attention(nn.Module):
    """nn.MultiheadAttention with its packed in_proj_weight split in three, so that q and v can
    train while k does not. (Masking k's gradient would not do: weight decay would still change it.)
    """

    def __init__(self, packed):
        super().__init__()
        q, k, v = packed.in_proj_weight.detach().chunk(3)
        self.heads = packed.num_heads
        self.q_proj_weight = nn.Parameter(q.clone())
        self.k_proj_weight = nn.Parameter(k.clone())
        self.v_proj_weight = nn.Parameter(v.clone())
        self.in_proj_bias = packed.in_proj_bias
        self.out_proj = packed.out_proj

    def forward(self, x, before=None, causal=False):
        """x [B,n,width] -> [B,n,width]. before [1,p,width]: tokens that precede those of every row
        and are attended to as well. causal: a token attends to none that follows it."""
        q_bias, k_bias, v_bias = self.in_proj_bias.chunk(3)
        y = x if before is None else torch.cat([before.expand(len(x), -1, -1), x], 1)
        q = self.split_heads(F.linear(x, self.q_proj_weight, q_bias))  # [B,heads,n,width/heads]
        k = self.split_heads(F.linear(y, self.k_proj_weight, k_bias))  # [B,heads,p+n,width/heads]
        v = self.split_heads(F.linear(y, self.v_proj_weight, v_bias))
        mask = None
        if causal:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=x.device)
            mask = mask.tril(k.shape[2] - q.shape[2])
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(x.transpose(1, 2).flatten(2))

    def split_heads(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def value(self, x):
        """The value path alone, as if every token attended to itself: for the dense last block."""
        v_bias = self.in_proj_bias.chunk(3)[2]
        return self.out_proj(F.linear(x, self.v_proj_weight, v_bias))


def mlp(up, activation, down, x):
    """down(activation(up(x))). The activation is not kept for the backward pass but computed again,
    which halves a block's memory for next to no work. (down's parameters are arguments so that
    torch.func.functional_call can replace them.)"""
    def rest(hidden, weight, bias):
        return F.linear(activation(hidden), weight, bias)

    if torch.compiler.is_compiling():  # which chooses by itself what to keep
        return rest(up(x), down.weight, down.bias)
    return checkpoint(rest, up(x), down.weight, down.bias, use_reentrant=False)


def run_block(block, x, before=None, causal=False):
    """One residual block of open_clip's transformer whose attention is ours; x [B,n,width], before
    and causal as there."""
    if before is not None:
        before = block.ln_1(before)
    x = x + block.ls_1(block.attn(block.ln_1(x), before, causal))
    return x + block.ls_2(mlp(*block.mlp, block.ln_2(x)))


def run_dense_block(block, x, class_token_residual):
    """CLIP's last block read densely: no token looks at another. x [B,1+L,width] -> the same.

    h = out_proj(v_proj(ln_1(x))) + x[:, :1], then h + mlp(ln_2(h)): as in CAT-Seg, the residual of
    the class token is added at every position. class_token_residual=False: each position's own, for
    a CLIP that pools by averaging, whose class token means nothing.
    """
    residual = x[:, :1] if class_token_residual else x
    x = residual + block.ls_1(block.attn.value(block.ln_1(x)))
    return x + block.ls_2(mlp(*block.mlp, block.ln_2(x)))


class ImageEncoder(nn.Module):
    """open_clip's VisionTransformer, read densely: images to patch embeddings in the joint space.

    image_size: the side of the square images given to `forward`. When the patch size does not
    divide it (ViT-L/14@336 under CAT-Seg's 384 crops), images are resized to that of pre-training.
    """

    def __init__(self, visual, image_size, class_token_residual):
        super().__init__()
        for block in visual.transformer.resblocks:
            block.attn = Attention(block.attn)
        self.visual = visual
        self.class_token_residual = class_token_residual
        patch_size = visual.patch_size[0]
        self.input_size = visual.image_size[0] if image_size % patch_size else image_size
        self.grid = self.input_size // patch_size

    def forward(self, images):
        """images [B,3,S,S] with CLIP's mean and standard deviation -> patches [B,L,D], not of unit
        length; middle features: the patch tokens after one and after two thirds of the blocks, each
        [B,width,H,W]."""
        visual = self.visual
        blocks = visual.transformer.resblocks
        if images.shape[-1] != self.input_size:
            images = F.interpolate(images, (self.input_size, self.input_size), mode="bilinear")
        x = visual.conv1(images).flatten(2).transpose(1, 2)  # [B,L,width]
        class_token = visual.class_embedding.expand(len(x), 1, -1).to(x)
        x = torch.cat([class_token, x], 1)  # [B,1+L,width]
        x = visual.ln_pre(x + resize_positions(visual.positional_embedding, self.grid).to(x))
        middle = []
        for i, block in enumerate(blocks[:-1], start=1):
            x = run_block(block, x)
            if i in (len(blocks) // 3, 2 * len(blocks) // 3):
                middle.append(x[:, 1:].transpose(1, 2).unflatten(2, (self.grid, self.grid)))
        x = run_dense_block(blocks[-1], x, self.class_token_residual)
        patches = visual.ln_post(x[:, 1:]) @ visual.proj  # [B,L,D]
        return patches, middle


def resize_positions(embedding, grid):
    """CLIP's positional embedding [1+n*n,width] -> [1+grid*grid,width], without antialiasing."""
    side = math.isqrt(len(embedding) - 1)
    if side == grid:
        return embedding
    square = embedding[1:].T.unflatten(1, (side, side))[None]  # [1,width,side,side]
    square = F.interpolate(square.float(), (grid, grid), mode="bicubic")
    return torch.cat([embedding[:1], square[0].flatten(1).T.to(embedding)])


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

    def forward(self, tokens, start=1):
        """tokens [K,n] -> text embeddings [K,D], of unit length. Attention is causal: nothing after
        the end token (the highest id) matters, so n need not be the full context; and where all
        rows begin with the same tokens, these are computed once. start: their number, 1 for the
        start token alone, PROMPT_START for prompts of `tokenize`.
        (test_a_common_start_changes_nothing)"""
        x = self.token_embedding(tokens) + self.positional_embedding[:tokens.shape[1]]
        before, x = x[:1, :start], x[:, start:]  # [1,start,width], [K,n-start,width]
        for block in self.transformer.resblocks:
            x = run_block(block, x, before, causal=True)
            before = run_block(block, before, causal=True)  # as the next block needs it
        x = x[torch.arange(len(x), device=x.device), tokens.argmax(-1) - start]  # [K,width]
        return F.normalize(self.ln_final(x) @ self.text_projection, dim=-1)


def tokenize(names, context_length=77, prompt=PROMPT):
    """K class names in a prompt -> tokens [K,n], n being the longest one's length. Of
    comma-separated synonyms the first counts."""
    prompts = [prompt.format(name.split(",")[0].strip()) for name in names]
    tokens = make_tokenizer(context_length=context_length)(prompts)
    longest = tokens.argmax(-1).max() + 1
    return tokens[:, :longest]


def linear_split(linear, x, guidance):
    """linear(cat([x, guidance], -1)) without the concatenation. x [B,K,...,C]; guidance has 1 in
    place of the axes over which it is the same, and is projected once for all of these."""
    of_x, of_guidance = linear.weight.split(x.shape[-1], 1)
    return F.linear(x, of_x) + F.linear(guidance, of_guidance, linear.bias)


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

    def forward(self, x, guidance):
        """x [B,K,H,W,C], guidance [B,1,H,W,C] -> [B,K,H,W,C]."""
        y = self.to_windows(self.norm1(x))
        guidance = self.to_windows(guidance)
        q = self.split_heads(linear_split(self.q, y, guidance))
        k = self.split_heads(linear_split(self.k, y, guidance))
        v = self.split_heads(self.v(y))  # [B*K*windows,heads,w*w,C/heads]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(x))
        y = self.proj(y.transpose(1, 2).flatten(2))
        x = x + self.from_windows(y, x.shape)
        return x + mlp(*self.mlp, self.norm2(x))

    def to_windows(self, x):
        """[B,K,H,W,C] -> [B,K,windows,w*w,C], rolled by the shift."""
        B, K, H, W, C = x.shape
        w = self.window
        if self.shift_size:
            x = x.roll((-self.shift_size, -self.shift_size), (2, 3))
        x = x.reshape(B, K, H // w, w, W // w, w, C).transpose(3, 4)
        return x.reshape(B, K, -1, w * w, C)

    def from_windows(self, x, shape):
        """The inverse of `to_windows`, for x of any shape; shape: (B, K, H, W, C)."""
        B, K, H, W, C = shape
        w = self.window
        x = x.reshape(B, K, H // w, W // w, w, w, C).transpose(3, 4).reshape(shape)
        if self.shift_size:
            x = x.roll((self.shift_size, self.shift_size), (2, 3))
        return x

    def split_heads(self, x):
        """[B,K,windows,w*w,C] -> [B*K*windows,heads,w*w,C/heads], a view."""
        return x.flatten(0, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def mask(self, x):
        """-100 between positions that only the roll made neighbours: [B*K*windows,1,w*w,w*w]."""
        if not self.shift_size:
            return None
        B, K, H, W = x.shape[:4]
        rows = (torch.arange(H, device=x.device) < self.shift_size).int()  # 1: rolled far away
        columns = (torch.arange(W, device=x.device) < self.shift_size).int()
        region = (2 * rows[:, None] + columns)[None, None, :, :, None]  # [1,1,H,W,1]
        region = self.to_windows(region)[0, 0]  # [windows,w*w,1]
        mask = -100.0 * (region != region.transpose(1, 2)).to(x.dtype)
        return mask.repeat(B * K, 1, 1)[:, None]


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
        self.padding_token = nn.Parameter(torch.zeros(C))
        self.padding_guidance = nn.Parameter(torch.zeros(C))
        self.q = nn.Linear(2 * C, C)
        self.k = nn.Linear(2 * C, C)
        self.v = nn.Linear(C, C)
        self.norm1 = nn.LayerNorm(C)
        self.norm2 = nn.LayerNorm(C)
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C), nn.ReLU(), nn.Linear(4 * C, C))

    def forward(self, x, guidance):
        """x [B,K,H,W,C], guidance [B,K,1,1,C] -> [B,K,H,W,C]. Pools 2x2 in training, as CAT-Seg."""
        B, K, H, W, C = x.shape
        y = x
        if self.training:
            y = y.reshape(B, K, H // 2, 2, W // 2, 2, C).mean((3, 5))  # [B,K,H/2,W/2,C]
        y = y + self.attend(self.norm1(y), guidance)
        y = y + mlp(*self.mlp, self.norm2(y))
        if self.training:
            y = y.flatten(0, 1).permute(0, 3, 1, 2)  # [B*K,C,H/2,W/2]
            y = F.interpolate(y, (H, W), mode="bilinear", align_corners=True)
            y = y.permute(0, 2, 3, 1).unflatten(0, (B, K))
        return x + y

    def attend(self, x, guidance):
        """q (k^T v) / (q (sum of k)) over the K classes of x [B,K,h,w,C], padded to 256, with
        q, k = elu(linear(cat([x, guidance], -1))) + 1 and v = linear(x). Returns [B,K,h,w,C]."""
        q = self.feature_map(linear_split(self.q, x, guidance))  # [B,K,h,w,heads,C/heads]
        k = self.feature_map(linear_split(self.k, x, guidance))
        v = self.v(x).unflatten(-1, (self.heads, -1))
        length = max(x.shape[1], MAX_CLASSES)  # v is divided by it lest fp16 overflow
        kv = torch.einsum("bkxyhc,bkxyhd->bxyhcd", k, v / length)
        pad_kv, pad_k = self.padding(x.shape[1], length)
        norm = torch.einsum("bkxyhc,bxyhc->bkxyh", q, k.sum(1) + pad_k) + 1e-6
        out = torch.einsum("bkxyhc,bxyhcd->bkxyhd", q, kv + pad_kv)
        return (out / norm[..., None] * length).flatten(-2)

    def feature_map(self, x):
        return F.elu(x.unflatten(-1, (self.heads, -1))) + 1

    def padding(self, K, length):
        """What padding adds to the sums of k^T v [heads,C/heads,C/heads] and of k [heads,C/heads].

        CAT-Seg appends 256 - K copies of a learned token to the class axis. As they are equal, the
        sum over them is one outer product times their number.
        """
        copies = max(MAX_CLASSES - K, 0)
        token = self.norm1(self.padding_token)
        k = self.feature_map(linear_split(self.k, token, self.padding_guidance))
        v = self.v(token).unflatten(-1, (self.heads, -1))
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
        x = F.relu(self.norm1(self.up_and_conv1(x, guidance)), inplace=True)
        return F.relu(self.norm2(self.conv2(x)), inplace=True)

    def up_and_conv1(self, x, guidance):
        """conv1(cat([up(x), guidance], 1)), with guidance repeated for each of the K classes.

        conv1 is linear, and nothing stands between it and `up`: the part of x is one transposed
        convolution with the product of both kernels. The part of guidance and of up's bias is the
        same for all classes and computed once. (test_up_and_conv1_equals_the_two_convolutions)
        """
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
    number; C: channels; layers: pairs of aggregations. What the project expects of a head:
    `aggregate` and `decode`, which `Segmenter.compute_logits` calls; the bias of `logit`, on which
    --prior is set (by default with the tiny CLIP); the attribute `recompute`, which train.py sets:
    whether to forget the widest activations and compute them again in the backward pass. Parameters
    with "norm" in their name get no weight decay. --compile of evaluate.py names the modules that
    it compiles, and `support.weights.CAT_SEG_NAMES` CAT-Seg's tensors.
    """

    def __init__(self, D, width, grid, C=128, layers=2):
        super().__init__()
        self.recompute = False
        self.embed = nn.Conv2d(1, C, 7, padding=3)
        self.image_guidance = nn.Conv2d(D, C, 3, padding=1)
        self.text_guidance = nn.Linear(D, C)
        self.spatial = nn.ModuleList(SpatialAggregation(C, grid // 2) for _ in range(layers))
        self.classes = nn.ModuleList(ClassAggregation(C) for _ in range(layers))
        self.middle_up = nn.ModuleList([nn.ConvTranspose2d(width, 2 * C, 2, stride=2),
                                        nn.ConvTranspose2d(width, C, 4, stride=4)])
        self.middle_guidance = nn.ModuleList([nn.Conv2d(2 * C, C // 4, 3, padding=1),
                                              nn.Conv2d(C, C // 8, 3, padding=1)])
        self.decoder = nn.ModuleList([Upsample(C, C // 2, C // 4),
                                      Upsample(C // 2, C // 4, C // 8)])
        self.logit = nn.Conv2d(C // 4, 1, 3, padding=1)

    def aggregate(self, cost, patches, text):
        """cost [B,K,H,W], patches [B,L,D], text [B,K,D] -> features [B,K,H,W,C]."""
        B, K, H, W = cost.shape
        x = self.embed(cost.reshape(B * K, 1, H, W)).permute(0, 2, 3, 1).unflatten(0, (B, K))
        image = self.image_guidance(patches.transpose(1, 2).unflatten(2, (H, W))).relu()
        image = image.permute(0, 2, 3, 1)[:, None]  # [B,1,H,W,C]
        text = self.text_guidance(text).relu()[:, :, None, None]  # [B,K,1,1,C]
        for spatial, classes in zip(self.spatial, self.classes):
            x = self.per_class(spatial, x, image)
            if self.recompute:
                x = checkpoint(classes, x, text, use_reentrant=False)
            else:
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

    def per_class(self, f, x, *guidance, chunk=16):
        """f(x, *guidance), where f treats each class of x [B,K,...] by itself: in chunks of
        classes, to bound memory, unless all activations are kept for a backward pass."""
        if not torch.is_grad_enabled():
            return torch.cat([f(some, *guidance) for some in x.split(chunk, 1)], 1)
        if self.recompute:
            return torch.cat([checkpoint(f, some, *guidance, use_reentrant=False)
                              for some in x.split(chunk, 1)], 1)
        return f(x, *guidance)


class Segmenter(nn.Module):
    """CLIP's two encoders and the head. `config` is what `build` needs to make the same again."""

    def __init__(self, clip, image_size, channels, config):
        super().__init__()
        visual = clip.visual
        self.config = config
        self.image_size = image_size
        self.image_encoder = ImageEncoder(visual, image_size,
                                          class_token_residual=visual.pool_type == "tok")
        self.text_encoder = TextEncoder(clip)
        self.logit_scale = clip.logit_scale
        self.grid = (self.image_encoder.grid, self.image_encoder.grid)  # rows, columns of patches
        self.head = Head(visual.output_dim, visual.conv1.out_channels, self.grid[0], channels)
        self.set_trained("both")

    def tokenize(self, names, prompt=PROMPT):
        """K class names -> tokens [K,n] on the model's device; see the function `tokenize`."""
        context = self.text_encoder.context_length
        return tokenize(names, context, prompt).to(self.logit_scale.device)

    def encode_image(self, images):
        """images [B,3,S,S] -> patches V [B,L,D], middle features for `Head.decode`."""
        return self.image_encoder(images)

    def encode_text(self, tokens, start=1):
        """tokens [K,n] -> T [K,D], of unit length. start: as in `TextEncoder`."""
        return self.text_encoder(tokens, start)

    def cost(self, patches, text):
        """Cosines of every patch [B,L,D] with every class [K,D]: [B,K,H,W]."""
        V, T = F.normalize(patches, dim=-1), F.normalize(text, dim=-1)
        return torch.einsum("bld,kd->bkl", V, T).unflatten(2, self.grid)

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

    def forward(self, images, tokens, start=1):
        """images [B,3,S,S], tokens [K,n] -> logits [B,K,4H,4W], patches [B,L,D], text [K,D]."""
        patches, middle = self.encode_image(images)
        text = self.encode_text(tokens, start)
        return self.compute_logits(patches, middle, text), patches, text

    def set_trained(self, adapt):
        """Choose what trains: the head, and the q and v weights of the encoders that `adapt` names:
        both, visual, text or none; but not the last visual block's q, which is never used."""
        if adapt not in ("both", "visual", "text", "none"):
            raise ValueError(f"adapt is both, visual, text or none, not {adapt!r}")
        self.requires_grad_(False)
        self.head.requires_grad_(True)
        for encoder, name in ((self.image_encoder, "visual"), (self.text_encoder, "text")):
            for attention in encoder.modules():
                if isinstance(attention, Attention):
                    attention.q_proj_weight.requires_grad = adapt in ("both", name)
                    attention.v_proj_weight.requires_grad = adapt in ("both", name)
        self.image_encoder.visual.transformer.resblocks[-1].attn.q_proj_weight.requires_grad = False


def build(clip, image_size=384, channels=128, load_weights=None):
    """A Segmenter over an open_clip model, with random weights unless load_weights fills them in.

    clip: "tiny", or an open_clip ViT such as "ViT-B-16-quickgelu". image_size: side of the training
    crops. channels: width of the head. load_weights: called with the open_clip.model.CLIP before
    its attention is split. `support.weights.build` reads published files and refuses other CLIPs.
    """
    model = open_clip.model.CLIP(**clip_sizes(clip))
    if load_weights is not None:
        load_weights(model)
    config = dict(clip=clip, image_size=image_size, channels=channels)
    return Segmenter(model, image_size, channels, config)


def clip_sizes(clip):
    """A CLIP's arguments of open_clip.model.CLIP; None for a name that open_clip does not know."""
    return TINY if clip == "tiny" else open_clip.get_model_config(clip)

"""Momentum CLIP-V: an exponential moving average of the visual encoder, the teacher of SPD and CPA."""
import torch
from torch.func import functional_call


class MomentumEncoder:
    """E^M of the paper: E^M = alpha * E^M + (1 - alpha) * E, starting as a copy of the encoder it is made from.

    Only the q and v projections of the visual encoder train, so only they can differ between the two encoders. This
    object owns a copy of just those tensors, and runs the target's own modules with them put in place: exactly a second
    encoder, for a few per cent of its memory. It is no nn.Module: no optimiser and no DDP can find it.

    model: a Segmenter. alpha: the momentum, in [0, 1]; 1 keeps the encoder as it is now (a frozen teacher).
    """

    def __init__(self, model, alpha):
        if not 0 <= alpha <= 1:
            raise ValueError(f"the momentum alpha must lie in [0, 1], not {alpha}")
        self.alpha = alpha
        self.encoder = model.image_encoder
        self.tensors = {name: p.detach().clone() for name, p in self.encoder.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self):
        """E^M = alpha E^M + (1 - alpha) E, once after each optimiser step."""
        target = dict(self.encoder.named_parameters())
        for name, average in self.tensors.items():
            average.mul_(self.alpha).add_(target[name], alpha=1 - self.alpha)

    @torch.no_grad()
    def encode_image(self, images):
        """V^M: images [B,3,H,W], normalised, to patches [B,L,D], without a graph."""
        patches, _ = functional_call(self.encoder, self.tensors, (images,))
        return patches

    def state_dict(self):
        """The momentum tensors by name, and alpha. The shared, frozen tensors belong to the target's checkpoint."""
        return {"alpha": self.alpha, "tensors": self.tensors}

    def load_state_dict(self, state):
        """Takes back what `state_dict` gave. Raises ValueError when names or shapes are not this encoder's."""
        shapes = {name: tuple(t.shape) for name, t in self.tensors.items()}
        found = {name: tuple(t.shape) for name, t in state["tensors"].items()}
        if found != shapes:
            differ = sorted(name for name in shapes | found if shapes.get(name) != found.get(name))
            raise ValueError(f"the momentum state does not fit this encoder: {len(differ)} tensors differ, {differ[0]} first")
        self.alpha = state["alpha"]
        for name, tensor in self.tensors.items():
            tensor.copy_(state["tensors"][name])

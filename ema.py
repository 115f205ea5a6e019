"""Momentum CLIP-V: a moving average of the visual encoder, the teacher of SPD and CPA."""
import copy

import torch


def frozen_copy(encoder):
    """A copy of `encoder` (any nn.Module) as it is now, in eval mode, without gradients.

    Parameters without requires_grad never change, so the copy shares them with `encoder`; it owns
    the others, and the buffers: of CLIP-V, whose q and v train, a sixth. Choose what trains before
    calling this: what is unfrozen later would change in the copy too."""
    shared = {id(p): p for p in encoder.parameters() if not p.requires_grad}
    # deepcopy takes `shared` for copies that it has made already
    return copy.deepcopy(encoder, shared).eval().requires_grad_(False)


class MomentumEncoder:
    """E^M of the paper: E^M = alpha * E^M + (1 - alpha) * E, starting as a copy of E.

    encoder: E, the encoder that is trained (the paper's target; here the average follows it), any
    nn.Module. alpha: the momentum, in [0, 1]; with 1, its parameters stay as they are: a frozen
    teacher. Calling it runs E^M without a graph and returns what E returns. On purpose it is no
    nn.Module, so that neither the optimiser nor DDP sees its parameters.
    """

    def __init__(self, encoder, alpha):
        if not 0 <= alpha <= 1:
            raise ValueError(f"the momentum alpha must lie in [0, 1], not {alpha}")
        self.alpha = alpha
        self.target = encoder
        self.average = frozen_copy(encoder)

    @torch.no_grad()
    def __call__(self, *inputs):
        return self.average(*inputs)

    @torch.no_grad()
    def update(self):
        """E^M = alpha E^M + (1 - alpha) E, once after each optimiser step; buffers are copied."""
        for average, target in zip(self.average.parameters(), self.target.parameters()):
            if average is not target:
                average.mul_(self.alpha).add_(target, alpha=1 - self.alpha)
        for average, target in zip(self.average.buffers(), self.target.buffers()):
            average.copy_(target)

    def own_tensors(self):
        """{name: tensor} of what E^M does not share with E."""
        shared = {id(p) for p in self.target.parameters()}
        named = [*self.average.named_parameters(), *self.average.named_buffers()]
        return {name: tensor.data for name, tensor in named if id(tensor) not in shared}

    def state_dict(self):
        """Its own tensors by name, and alpha. The shared ones are in E's state."""
        return {"alpha": self.alpha, "tensors": self.own_tensors()}

    def load_state_dict(self, state):
        """Takes back what `state_dict` gave. Raises ValueError when it is another encoder's."""
        own = self.own_tensors()
        shapes = {name: tensor.shape for name, tensor in own.items()}
        found = {name: tensor.shape for name, tensor in state["tensors"].items()}
        differ = sorted(n for n in shapes | found if shapes.get(n) != found.get(n))
        if differ:
            raise ValueError(f"the momentum state does not fit this encoder: {len(differ)} tensors "
                             f"differ, {differ[0]} first")
        self.alpha = state["alpha"]
        for name, tensor in own.items():
            tensor.copy_(state["tensors"][name])
